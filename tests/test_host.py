"""How the ranks of a host share its cores."""

import pytest

from ulysses_infer.host import SharedCores, cpu_quota, shared_cores

TWO, FOUR = frozenset({0, 1}), frozenset({0, 1, 2, 3})


@pytest.mark.parametrize(
    ("own", "others", "ranks_on_host", "quota", "expected"),
    [
        (FOUR, [FOUR, FOUR], 2, None, (4, 2)),
        (TWO, [TWO, TWO, TWO], 3, None, (2, 3)),
        (FOUR, [FOUR], 4, None, (4, 4)),  # other replicas run on the same cores
        (FOUR, [FOUR, FOUR], 2, 1.5, (1, 2)),  # as with `docker run --cpus 1.5`
        (TWO, [TWO, frozenset({2, 3})], 2, None, (2, 1)),  # a launcher gave each rank its own cores
        (TWO, [TWO, FOUR], 2, None, (4, 2)),
    ],
)
def test_ranks_share_the_cores_that_they_may_run_on(own, others, ranks_on_host, quota, expected):
    assert shared_cores(own, others, ranks_on_host, quota) == expected


@pytest.mark.parametrize(
    ("cores", "ranks", "threads", "message"),
    [
        (2, 3, 1, "3 ranks on 2 cores: waits yield early"),
        (1, 2, 1, "2 ranks on 1 core: waits yield early"),
        (4, 2, 4, "2 ranks of 4 threads on 4 cores: waits yield early"),
        (2, 2, 1, ""),
        (4, 2, 2, ""),
        (1, 1, 8, ""),
    ],
)
def test_ranks_that_outnumber_cores_are_reported(cores, ranks, threads, message):
    assert SharedCores(cores, ranks).crowding(threads) == message


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(4, 2, 2), (2, 3, 1), (7, 2, 3)])
def test_threads_are_shared_out(cores, ranks, threads):
    assert SharedCores(cores, ranks).threads_per_rank == threads


def test_the_least_limit_of_nested_control_groups_counts(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("0::/outer/inner\n")
    inner = tmp_path / "fs" / "outer" / "inner"
    inner.mkdir(parents=True)
    assert cpu_quota(tmp_path / "fs", membership) is None
    (inner / "cpu.max").write_text("max 100000\n")
    (inner.parent / "cpu.max").write_text("250000 100000\n")
    assert cpu_quota(tmp_path / "fs", membership) == 2.5
    (inner / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path / "fs", membership) == 1.5


def test_limits_of_version_1_control_groups_are_read(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("4:cpu,cpuacct:/box\n3:memory:/box\n")
    folder = tmp_path / "fs" / "cpu,cpuacct" / "box"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("300000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path / "fs", membership) == 3
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_quota(tmp_path / "fs", membership) is None


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert cpu_quota(tmp_path, tmp_path / "nothing") is None
