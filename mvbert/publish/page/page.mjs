// The page: what is typed goes to the worker, what comes back is shown.

// A v128 constant: the smallest module that needs SIMD, which ONNX Runtime is compiled with.
const SIMD = new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1,
  8, 0, 65, 0, 253, 15, 253, 98, 11]);
const PAUSE = 120;  // milliseconds without a key before a text is run

const WHAT = {
  fill: 'Guesses the words you leave open.',
  labels: 'Classifies a text.',
  slots: 'Labels the words of a sentence.',
  search: 'Searches a text by meaning.',
};

const byId = (id) => document.getElementById(id);

/** An element with attributes and children; properties of events begin with "on". */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith('on')) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

function show(message, isError = false) {
  const status = byId('status');
  status.textContent = message;
  status.classList.toggle('error', isError);
  if (isError) status.setAttribute('role', 'alert');
}

// ---- the worker ---------------------------------------------------------------------------------

const recent = [];  // milliseconds of the last texts
const waiting = new Map();
let worker, number = 0;

function run(texts) {
  return new Promise((resolve, reject) => {
    waiting.set(++number, { resolve, reject });
    worker.postMessage({ number, texts });
  });
}

function received({ data }) {
  if (data.failed !== undefined) {
    show(`The model did not load: ${data.failed}`, true);
  } else if (data.ready !== undefined) {
    start(data.ready);
  } else {
    const { resolve, reject } = waiting.get(data.number);
    waiting.delete(data.number);
    if (data.error !== undefined) reject(new Error(data.error));
    else resolve(data);
  }
}

function measured({ milliseconds, pieces, cut }) {
  recent.push(...milliseconds);
  recent.splice(0, recent.length - 15);
  const middle = [...recent].sort((a, b) => a - b)[recent.length >> 1];
  byId('speed').textContent = `${middle.toFixed(middle < 10 ? 1 : 0)} ms`;
  byId('pieces').textContent = `${pieces} pieces${cut ? ', the rest was cut off' : ''}`;
}

/** Calls work(isLatest) some time after the last call; what comes too late must not be shown. */
function debounced(work) {
  let timer, latest = 0;
  return () => {
    clearTimeout(timer);
    const mine = ++latest;
    timer = setTimeout(async () => {
      try {
        await work(() => mine === latest);
        if (mine === latest) show('');
      } catch (error) {
        if (mine === latest) show(error.message, true);
      }
    }, PAUSE);
  };
}

// ---- what the tasks share -----------------------------------------------------------------------

function field(label, value, attributes = {}) {
  const area = element('textarea', { id: 'text', dir: 'auto', spellcheck: 'false', ...attributes });
  area.value = value;
  return [element('label', { for: 'text' }, label), area];
}

function examples(config, use) {
  const buttons = config.examples.map((text) => element('button', { type: 'button', onclick: () => use(text) }, text));
  return element('div', { class: 'row' }, element('span', {}, 'Try:'), ...buttons);
}

/** Tells what came out: to screen readers alone where the results below say it to everybody. */
function tell(hint, text, visible = false) {
  hint.textContent = text;
  hint.classList.toggle('unseen', !visible);
}

function score(name, share, attributes = {}, ...before) {
  const kind = attributes.onclick === undefined ? 'div' : 'button';
  const bar = element(kind, { class: 'score', ...attributes },
    element('b', { dir: 'auto' }, ...before, name), element('span', {}, percent(share)));
  bar.style.setProperty('--share', `${100 * share}%`);
  return element('li', {}, bar);
}

function typed(area, work) {
  const later = debounced(work);
  area.addEventListener('input', later);
  later();
  return (text) => {
    area.value = text;
    later();
    area.focus();
  };
}

// ---- by task ------------------------------------------------------------------------------------

const MASK = '[MASK]';

const TASKS = {
  fill(main, config) {
    const [label, area] = field(`A sentence with ${MASK}`, config.examples[0]);
    const insert = element('button', {
      type: 'button', id: 'insert', onclick: () => {
        area.setRangeText(MASK, area.selectionStart, area.selectionEnd, 'end');
        use(area.value);
      } }, `Insert ${MASK}`);
    const hint = element('p', { id: 'hint', role: 'status' });
    const results = element('div', { id: 'results', class: 'columns' });
    main.append(label, area, element('div', { class: 'row' }, insert),
      examples(config, (text) => use(text)), hint, results);
    const fill = (place, piece) => {
      const parts = area.value.split(MASK);
      const start = parts.slice(0, place + 1).join(MASK), rest = parts.slice(place + 1).join(MASK);
      use(piece.startsWith('##') ? start.trimEnd() + piece.slice(2) + rest : start + piece + rest);
    };
    const use = typed(area, async (current) => {
      const reply = await run([area.value]);
      if (!current()) return;
      measured(reply);
      const [masks] = reply.results;
      if (masks.length === 0) tell(hint, `Put ${MASK} where a word should be guessed.`, true);
      else tell(hint, `Likeliest: ${masks.map(([[piece]]) => piece).join(', ')}.`);
      results.replaceChildren(...masks.map((pieces, place) => element('section', {},
        element('h2', {}, masks.length > 1 ? `${MASK} ${place + 1}` : 'Likeliest pieces'),
        element('ol', { class: 'scores' }, ...pieces.map(([piece, share]) => score(piece, share, {
          type: 'button', title: `Put ${piece} in`, onclick: () => fill(place, piece) }))))));
    });
  },

  labels(main, config) {
    const [label, area] = field('A text', config.examples[0]);
    const hint = element('p', { id: 'hint', role: 'status' });
    const results = element('ol', { id: 'results', class: 'scores' });
    main.append(label, area, examples(config, (text) => use(text)), hint, element('h2', {}, 'Labels'), results);
    const use = typed(area, async (current) => {
      const reply = await run([area.value]);
      if (!current()) return;
      measured(reply);
      const best = reply.results[0].sort((a, b) => b[1] - a[1]).slice(0, 12);
      tell(hint, `${best[0][0]}, ${percent(best[0][1])}.`);
      results.replaceChildren(...best.map(([name, share]) => score(name, share)));
    });
  },

  slots(main, config) {
    const [label, area] = field('A sentence', config.examples[0]);
    const hint = element('p', { id: 'hint', role: 'status' });
    const results = element('p', { id: 'results', class: 'sentence', dir: 'auto' });
    const intents = element('section', { hidden: '' }, element('h2', {}, 'Intent'),
      element('ol', { id: 'intents', class: 'scores' }));
    main.append(label, area, examples(config, (text) => use(text)), hint, intents, element('h2', {}, 'Labels'), results);
    const kinds = [...new Set(config.labels.map((name) => name.replace(/^[BIES]-/, '')))].filter((name) => name !== 'O');
    const use = typed(area, async (current) => {
      const text = area.value, reply = await run([text]);
      if (!current()) return;
      measured(reply);
      const slots = [];
      let open;  // the slot that a word may continue
      const answer = reply.results[0];
      for (const [begin, end, name] of answer.words) {
        const kind = name.replace(/^[BIES]-/, '');
        if (kind !== 'O' && open?.kind === kind && !/^[BS]-/.test(name)) open.end = end;
        else if (kind === 'O') open = undefined;
        else slots.push(open = { begin, end, kind });
      }
      const parts = [];
      let at = 0;
      for (const { begin, end, kind } of slots) {
        const mark = element('mark', { class: 'slot' }, text.slice(begin, end), element('small', {}, kind));
        mark.style.setProperty('--hue', Math.round(360 * kinds.indexOf(kind) / kinds.length + 200) % 360);
        parts.push(text.slice(at, begin), mark);
        at = end;
      }
      results.replaceChildren(...parts, text.slice(at));
      const best = answer.intents.sort((a, b) => b[1] - a[1]).slice(0, 3);
      intents.hidden = best.length === 0;
      intents.lastChild.replaceChildren(...best.map(([name, share]) => score(name, share)));
      const said = slots.map(({ begin, end, kind }) => `${kind}: ${text.slice(begin, end)}`);
      if (best.length > 0) said.unshift(best[0][0]);
      tell(hint, said.join('; ') || 'No labels.', said.length === 0);
    });
  },

  search(main, config) {
    const [label, area] = field('A text, with a blank line between paragraphs', config.text, { class: 'long' });
    const query = element('input', { id: 'query', type: 'search', dir: 'auto', autocomplete: 'off' });
    query.value = config.examples[0];
    const hint = element('p', { id: 'hint', role: 'status' });
    const results = element('ol', { id: 'results', class: 'hits' });
    main.append(element('label', { for: 'query' }, 'Search for'), query,
      examples(config, (text) => { query.value = text; later(); }), hint, results, label, area);
    const vectors = new Map();  // of sentences and queries
    const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
    const split = (text) => (Intl.Segmenter === undefined ? [text]
      : Array.from(new Intl.Segmenter(undefined, { granularity: 'sentence' }).segment(text), ({ segment }) => segment));
    const later = debounced(async (current) => {
      const paragraphs = area.value.split(/\n\s*\n/).map((text) => text.trim()).filter(Boolean)
        .map((text) => split(text));
      const missing = [...new Set(paragraphs.flat())].filter((text) => !vectors.has(text));
      for (let i = 0; i < missing.length; i += 4) {
        tell(hint, `Reading: ${i} of ${missing.length} sentences`, true);
        const some = missing.slice(i, i + 4), reply = await run(some);
        measured(reply);
        some.forEach((text, j) => vectors.set(text, reply.results[j]));
        if (!current()) return;
      }
      const reply = await run([query.value]);
      if (!current()) return;
      measured(reply);
      const [wanted] = reply.results;
      const hits = paragraphs.map((sentences) => {
        const scores = sentences.map((sentence) => dot(wanted, vectors.get(sentence)));
        const best = Math.max(...scores);
        return { sentences, best, place: scores.indexOf(best) };
      }).sort((a, b) => b.best - a.best).slice(0, 20);
      tell(hint, hits.length === 0 ? 'There is no text to search.'
        : `${paragraphs.length} paragraphs, the closest first.`, true);
      results.replaceChildren(...hits.map(({ sentences, best, place }) => {
        const match = element('mark', {}, sentences[place].trimEnd());
        match.style.setProperty('--strength', `${100 * Math.min(Math.max(best / hits[0].best, 0), 1)}%`);
        return element('li', { class: 'hit', dir: 'auto' },
          element('small', { title: 'cosine of the closest sentence' }, best.toFixed(2)),
          sentences.slice(0, place).join(''), match, ' ', sentences.slice(place + 1).join(''));
      }));
    });
    area.addEventListener('input', later);
    query.addEventListener('input', later);
    later();
  },
};

// ---- the start ----------------------------------------------------------------------------------

function start(config) {
  document.title = `${config.name}: ${WHAT[config.task]}`;
  byId('title').textContent = config.name;
  byId('what').textContent = WHAT[config.task];
  const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e8 ? 1 : 0)} MB`;
  byId('size').textContent = megabytes(config.bytes);
  byId('runtime').textContent = megabytes(config.runtimeBytes);
  show('');
  TASKS[config.task](byId('main'), config);
  document.documentElement.dataset.ready = 'true';
}

async function keepOffline() {
  if (navigator.serviceWorker === undefined) {
    byId('offline').textContent = 'needs https or localhost';
    return;
  }
  try {
    await navigator.serviceWorker.register('sw.js');
    await navigator.serviceWorker.ready;
    byId('offline').textContent = 'ready';
  } catch (error) {
    byId('offline').textContent = `no: ${error.message}`;
  }
}

if (typeof WebAssembly !== 'object' || !WebAssembly.validate(SIMD)) {
  show('This browser has no WebAssembly with SIMD, which the model needs: Chrome 111, Firefox 114 and '
    + 'Safari 16.4 have it, and what is newer.', true);
} else {
  worker = new Worker('worker.mjs', { type: 'module' });
  worker.onmessage = received;
  worker.onerror = (event) => show(`The model did not load: ${event.message ?? 'this browser has no module workers'}`, true);
  keepOffline();
}
