"""What a run is said to be made with."""

import pytest

from mvbert.training import environment


@pytest.mark.parametrize(("changes", "mark"), [("", ""), (" M setup.py", "+")])
def test_a_tree_with_changes_is_told_from_its_commit(tmp_path, monkeypatch, changes, mark):
    answers = {"rev-parse": "0123456789ab", "status": changes}
    monkeypatch.setattr(environment, "_git", lambda root, command, *options: answers[command])
    monkeypatch.setattr(
        environment, "__file__", str(tmp_path / "mvbert" / "training" / "environment.py")
    )
    assert environment.commit() is None
    (tmp_path / ".git").mkdir()
    assert environment.commit() == "0123456789ab" + mark
