"""The option --reworded changes the prose of a message and nothing that a test may rely on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support import reworded

SOURCE = '''
"""the docstring of a module"""
KEYS = {"some key of a table": "the value of the table"}

def fail(name, key):
    if "not found here" in name or name.startswith("no such name"):
        raise ValueError(f"The run \\"{name}\\" already has some {key}={'a long value'!r}. Try `launch runs here`.")
'''


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ('The run "some name" already exists.', 'The run "some name" ALREADY EXISTS.'),
        (
            "Use run.resume=true, or a longer path/name of 12 words.",
            "Use run.resume=true, or a LONGER path/name of 12 WORDS.",
        ),
        ("Stop it with: launch stop some-name. Then retry", "Stop it WITH: launch stop some-name. Then RETRY"),
        ("is missing: pip install 'launch-train[azure]'.", "is MISSING: pip install 'launch-train[azure]'."),
    ],
)
def test_plain_words_change_and_quoted_values_stay(message: str, expected: str) -> None:
    assert reworded.reworded(message) == expected


def test_only_messages_of_a_module_change() -> None:
    module: dict[str, object] = {}
    tree = reworded.transformed(SOURCE)
    exec(compile(tree, "module", "exec"), module)
    assert module["__doc__"] == "the docstring of a module"
    assert module["KEYS"] == {"some key of a table": "the VALUE of the TABLE"}
    with pytest.raises(ValueError) as raised:
        module["fail"]("no such name of mine", "key.of.it")  # type: ignore[operator]
    expected = "The run \"no such name of mine\" ALREADY has SOME key.of.it='a LONG VALUE'. "
    assert str(raised.value) == expected + "Try `launch runs here`."


def test_a_child_process_rewords_its_messages_too() -> None:
    code = "from launcher.errors import did_you_mean; print(did_you_mean('aplha', ['alpha']))"
    environment = {**os.environ, "PYTHONPATH": str(reworded.SITE)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'Did you MEAN "alpha"?'
