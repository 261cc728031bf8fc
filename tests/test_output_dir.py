import json

import pytest

from fedtune.errors import ConfigError
from fedtune.output_dir import MARKER, prepare_output_dir

SETTINGS = {"lora_r": 8, "seeds": [42]}


def prepare(directory, *, resume=False, overwrite=False, settings=SETTINGS):
    return prepare_output_dir(directory, resume=resume, overwrite=overwrite, settings=settings)


def contents(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def used(tmp_path):
    """The directory of a finished run."""
    directory = prepare(tmp_path / "run")
    for name in ("adapter", "checkpoints", "seeds"):
        (directory / name).mkdir()
        (directory / name / "file").write_text("x")
    for name in ("summary.json", "rounds.jsonl", "loss.png", ".summary.json.tmp"):
        (directory / name).write_text("x")
    (directory / ".adapter.new").mkdir()
    return directory


def test_new_and_empty_directories_get_a_marker(tmp_path):
    assert contents(prepare(tmp_path / "a" / "b")) == [MARKER]
    (tmp_path / "empty").mkdir()
    assert contents(prepare(tmp_path / "empty", overwrite=True)) == [MARKER]


def test_a_used_directory_is_refused(used):
    before = contents(used)
    with pytest.raises(ConfigError, match="earlier run.*--resume.*--overwrite"):
        prepare(used)
    assert contents(used) == before


def test_a_foreign_directory_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"not empty \(thesis.tex\)"):
        prepare(tmp_path)
    with pytest.raises(ConfigError, match=r"thesis.tex.*nothing is deleted"):
        prepare(tmp_path, overwrite=True)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ConfigError, match="is a file"):
            prepare(tmp_path / "file", **flags)


def test_overwrite_deletes_a_run_and_nothing_else(used):
    prepare(used, overwrite=True, settings={"lora_r": 4})
    assert contents(used) == [MARKER]
    assert json.loads((used / MARKER).read_text())["settings"] == {"lora_r": 4}


@pytest.mark.parametrize("name", ["notes.txt", ".git", "model.py", ".notes.tmp"])
def test_overwrite_spares_a_run_with_foreign_files(used, name):
    (used / name).write_text("mine")
    before = contents(used)
    with pytest.raises(ConfigError, match="which fedtune did not write; nothing is deleted"):
        prepare(used, overwrite=True)
    assert contents(used) == before


def test_overwrite_needs_proof_of_a_run(tmp_path):
    (tmp_path / "model").mkdir()  # a name of ours, in a directory that is not
    with pytest.raises(ConfigError, match=f"no {MARKER}"):
        prepare(tmp_path, overwrite=True)
    (tmp_path / MARKER).write_text('{"other": 1}')
    with pytest.raises(ConfigError, match=f"no {MARKER}"):
        prepare(tmp_path, overwrite=True)
    assert (tmp_path / "model").is_dir()


def test_overwrite_does_not_follow_links(used, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    (used / "best").symlink_to(outside)
    prepare(used, overwrite=True)
    assert contents(outside) == ["file"]


def test_resume_before_the_first_checkpoint(tmp_path):
    prepare(tmp_path / "run")
    assert contents(prepare(tmp_path / "run", resume=True)) == [MARKER]


def test_resume_keeps_what_is_there_but_for_how_it_ended(used):
    before = contents(used)
    prepare(used, resume=True)
    assert contents(used) == [name for name in before if name not in ("loss.png", "summary.json")]


def test_resume_without_a_run(tmp_path):
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="no run to continue"):
            prepare(directory, resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_resume_with_other_settings_names_the_first(tmp_path):
    prepare(tmp_path / "run", settings={"lora_r": 8, "num_rounds": 3})
    with pytest.raises(ConfigError, match="--lora_r 8, received 4"):
        prepare(tmp_path / "run", resume=True, settings={"lora_r": 4, "num_rounds": 9})
    with pytest.raises(ConfigError, match="--num_rounds 3, received None"):
        prepare(tmp_path / "run", resume=True, settings={"lora_r": 8})


def test_resume_with_other_data_names_the_file(tmp_path):
    given = {"overwrite": False, "settings": SETTINGS}
    read = {"rows.jsonl": "a", "model/model.safetensors": "b"}
    prepare_output_dir(tmp_path / "run", resume=False, data=read, **given)
    with pytest.raises(ConfigError, match="rows.jsonl has changed since the run"):
        prepare_output_dir(tmp_path / "run", resume=True, data={**read, "rows.jsonl": "c"}, **given)
    prepare_output_dir(tmp_path / "run", resume=True, data=read, **given)


def test_resume_with_another_recipe_is_said(tmp_path, caplog):
    given = {"overwrite": False, "settings": SETTINGS}
    prepare_output_dir(tmp_path / "run", resume=False, code={"r.py": "a", "r.yaml": "b"}, **given)
    now = {"r.py": "c", "r.yaml": "b"}
    prepare_output_dir(tmp_path / "run", resume=True, code=now, **given)
    assert [record.getMessage() for record in caplog.records] == [
        "--resume: r.py has changed since the run began"
    ]
    prepare_output_dir(tmp_path / "run", resume=True, code={"r.yaml": "d"}, **given)
    with pytest.raises(ConfigError, match=r"--lora_r 8, received 4 \(r.yaml has changed since\)"):
        prepare_output_dir(
            tmp_path / "run",
            resume=True,
            overwrite=False,
            settings={**SETTINGS, "lora_r": 4},
            code={"r.yaml": "e"},
        )
