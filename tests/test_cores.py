"""What a number of threads means."""

import math
import os

import numpy as np
import pytest

from mvbert.cores import THREADS, _cpu_quota, cores
from mvbert.errors import InputError


def test_zero_is_one_thread_for_each_core_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5, 7, 8}, raising=False)
    for quota, expected in ((math.inf, 5), (9.0, 5), (2.5, 3), (2.0, 2), (0.1, 1)):
        monkeypatch.setattr("mvbert.cores._cpu_quota", lambda quota=quota: quota)
        assert cores(0) == cores() == expected
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1


def test_any_other_number_is_meant_as_it_stands():
    assert [cores(n) for n in (1, 7, np.int64(64), THREADS)] == [1, 7, 64, THREADS]
    for wrong in (-1, THREADS + 1, 1.5, "2", None):
        with pytest.raises(InputError, match=r"threads must be 0 \(all available cores\) or a"):
            cores(wrong)


def write(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, math.inf),
        ({"sys__fs__cgroup__cpu_DOT_max": "max 100000\n"}, math.inf),
        ({"sys__fs__cgroup__cpu_DOT_max": "250000 100000\n"}, 2.5),
        (
            {
                "proc__self__cgroup": "1:cpu:/x\n0::/outer/inner\n",
                "sys__fs__cgroup__outer__cpu_DOT_max": "150000 100000\n",
                "sys__fs__cgroup__outer__inner__cpu_DOT_max": "300000 100000\n",
            },
            1.5,
        ),
        (
            {
                "proc__self__cgroup": "0::/../../elsewhere\n",
                "sys__fs__cgroup__cpu_DOT_max": "400000 100000\n",
            },
            4.0,
        ),
        (
            {
                "sys__fs__cgroup__cpu__cpu_DOT_cfs_quota_us": "50000\n",
                "sys__fs__cgroup__cpu__cpu_DOT_cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            {
                "sys__fs__cgroup__cpu__cpu_DOT_cfs_quota_us": "-1\n",
                "sys__fs__cgroup__cpu__cpu_DOT_cfs_period_us": "100000\n",
            },
            math.inf,
        ),
        ({"sys__fs__cgroup__cpu_DOT_max": "rubbish"}, math.inf),
    ],
    ids=["none", "max", "container", "nested", "outside", "version 1", "v1 max", "unreadable"],
)
def test_the_quota_is_the_least_of_the_control_group_and_those_around_it(tmp_path, files, quota):
    write(tmp_path, **files)
    assert _cpu_quota(str(tmp_path)) == quota
