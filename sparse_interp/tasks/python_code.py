"""The Python tasks: small decisions that every reader of Python code makes, as paired prompts.

    single_double_quote    a string opened with ' or " is closed with the same quote. In train and test no string came
                           before it; in shifted closed ones did, of either kind (one form there is only longer)

Each is a file of templates, `data/tasks/<name>.json` (the form is explained in `tasks/task.py`). Names and wording
of the tasks follow Gao et al. 2025 (arXiv:2511.13653), table 1; the prompts are our own: identifiers, dictionary
keys and module names of Python's standard library, with messages and file names made of its words.
"""

import difflib

from transformers import PreTrainedTokenizerBase

from sparse_interp.data_files import data_folder
from sparse_interp.errors import TaskError
from sparse_interp.tasks.task import Task, TemplateFile


def task_names() -> list[str]:
    """The tasks that `load_task` knows, in alphabetical order."""
    return sorted(path.stem for path in (data_folder() / "tasks").glob("*.json"))


def load_task(name: str, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The bundled task called `name`, tokenised by `tokenizer`."""
    names = task_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise TaskError(
            f"No task is called {name!r}; {hint}Known tasks: {', '.join(names)}. "
            "Your own prompts become a task with Task.from_pairs."
        )
    return Task(name, tokenizer, TemplateFile.read(data_folder() / "tasks" / f"{name}.json"))
