"""Every `ringspan ...` that an operator may copy is one that the command line takes."""

from pathlib import Path

import pytest

TEXTS = ("deploy/README.md", "docs/operating.md", "docs/tutorial.md", "deploy/jobs/README.md")


@pytest.mark.parametrize("name", TEXTS)
def test_commands_of_the_documents_parse(name: str, root: Path, blocks, commands, parse) -> None:
    found = [words for block in blocks((root / name).read_text()) for words in commands(block)]
    assert found, f"{name} shows no command"
    for words in found:
        parse(words)


@pytest.mark.parametrize(
    "folder", ["deploy/docker", "deploy/kuberay", "deploy/ray", "deploy/slurm", "deploy/serve"]
)
def test_commands_in_comments_parse(folder: str, root: Path, commands, parse) -> None:
    """Where a file's head says how it is used."""
    for path in sorted((root / folder).iterdir()):
        if path.suffix in (".yaml", ".sbatch") or path.name.startswith("Dockerfile"):
            lines = path.read_text().splitlines()
            shown = "\n".join(line[4:] for line in lines if line.startswith("#   "))
            for words in commands(shown):
                parse(words)


def test_an_option_that_is_not_there_is_refused(parse) -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["prefill", "--model", "smollm2", "--input", "x", "--no-such-option"])
    with pytest.raises(Exception, match="Missing"):
        parse(["prefill", "--model", "smollm2"])
    assert parse(["contexts", "list", "--store", "x"])["store"] == Path("x")
