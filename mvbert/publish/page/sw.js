// Keeps the page's files, so that it works offline once it has loaded. VERSION and FILES are written
// by `mvbert export --page`; another VERSION replaces what was kept.

const VERSION = '';
const FILES = [];
const prefix = `mvbert ${self.registration.scope} `;
const name = prefix + VERSION;

self.addEventListener('install', (event) => {
  const requests = FILES.map((file) => new Request(file, { cache: 'no-cache' }));
  event.waitUntil(caches.open(name).then((cache) => cache.addAll(requests)).then(() => self.skipWaiting()));
});

self.addEventListener('activate', (event) => {
  event.waitUntil((async () => {
    const old = (await caches.keys()).filter((key) => key.startsWith(prefix) && key !== name);
    await Promise.all(old.map((key) => caches.delete(key)));
    await self.clients.claim();
  })());
});

self.addEventListener('fetch', (event) => {
  if (event.request.method !== 'GET') return;
  event.respondWith((async () => {
    const cache = await caches.open(name);
    return await cache.match(event.request) ?? fetch(event.request);
  })());
});
