"""The tasks that come with the library, by name.

    task_names()                     ["single_double_quote", ...]
    load_task(name, tokenizer)       the task, written by that tokenizer
    tasks()                          all of them, one row each

A task is a template file, `data/tasks/<name>.json`. `tasks/python_code.py` and `tasks/stories.py` say what each one
asks and why its prompts leave no other answer.
"""

import difflib
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
from transformers import PreTrainedTokenizerBase

from sparse_interp.data_files import data_folder
from sparse_interp.errors import TaskError
from sparse_interp.results import Table
from sparse_interp.tasks.python_code import PYTHON_TASKS
from sparse_interp.tasks.stories import STORY_TASKS
from sparse_interp.tasks.task import Task
from sparse_interp.tasks.templates import TemplateFile


@dataclass(frozen=True, eq=False)
class TaskTable(Table):
    """One row per task: what it asks, and how many templates each split has."""

    columns: ClassVar[tuple[str, ...]] = ("task", "text", "train", "test", "shifted", "description")


def task_names() -> list[str]:
    """The tasks that `load_task` knows: those of Python code in the paper's order, then those of stories."""
    return [*PYTHON_TASKS, *STORY_TASKS]


def tasks() -> TaskTable:
    """The tasks that come with the library: the text they are about, templates per split, what they ask."""
    rows = []
    for name in task_names():
        source = template_file(name)
        counts = {split: sum(split in form.splits for form in source.templates) for split in source.splits}
        text = "Python" if name in PYTHON_TASKS else "stories"
        rows.append({"task": name, "text": text, **counts, "description": source.description})
    return TaskTable(pd.DataFrame(rows, columns=list(TaskTable.columns)))


def load_task(name: str, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The bundled task called `name`, tokenised by `tokenizer`.

    Raises:
        TaskError: for a name that no task has, with the nearest ones; for a tokenizer that cannot write the task.
    """
    return Task(name, tokenizer, template_file(name))


def template_file(name: str) -> TemplateFile:
    """The templates of the bundled task called `name`."""
    names = task_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise TaskError(
            f"No task is called {name!r}; {hint}Known tasks: {', '.join(names)}. "
            "Your own prompts become a task with Task.from_pairs."
        )
    return TemplateFile.read(data_folder() / "tasks" / f"{name}.json")
