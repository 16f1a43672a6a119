"""Python itself says that every prompt goes on with its answer, and that the foil will not do.

The checks know nothing of templates: they parse, run and count the programs that come out of them.
"""

import ast
import io
import random
import re
import tokenize
from collections.abc import Callable

import pytest

from sparse_interp.tasks.library import template_file
from sparse_interp.tasks.pairs import Candidate
from sparse_interp.tasks.python_code import PYTHON_TASKS

SPLITS = ("train", "test", "shifted")
ITEMS = ["alpha", "beta"]

BODIES = ["\n            pass\n", "\n                pass\n", "\n            pass\n    finally:\n        pass\n"]
ENDINGS = [
    *("", "\n", " x\n", "x\n", ": x\n", " else x\n", "()\n", "(x)\n", "]\n", "}\n", "'\n", '"\n', "')\n", '")\n'),
    *(inside + brackets for inside in ("", "x", " x", "None", " x, x", " else x") for brackets in (")\n", "))\n")),
    *BODIES,
    *(head + ":" + body for head in ("", " x", " in x", " x in x", " f") for body in BODIES),
]
"""Ways in which a program may go on after the next token; none of them makes another sign of it (`=` into `==`)."""


def drawn(name: str, split: str) -> list[Candidate]:
    """Every template of the split, with words drawn four times."""
    source, rng = template_file(name), random.Random(1)
    numbers = [number for number, form in enumerate(source.templates) if split in form.splits]
    return [source.fill(number, source.fillers[split], rng) for number in 4 * numbers]


def sides(candidate: Candidate) -> list[tuple[str, str, str, str, str]]:
    """(prompt, answer, what follows it, foil, what would follow that) for either prompt of a pair."""
    (answer, foil), (rest, foil_rest) = candidate.answers[0], candidate.rests
    return [
        (candidate.clean, answer, rest, foil, foil_rest),
        (candidate.corrupt, foil, foil_rest, answer, rest),
    ]


def parses(program: str) -> bool:
    try:
        ast.parse(program)
    except SyntaxError:
        return False
    return True


def can_go_on(text: str, rests: tuple[str, str]) -> bool:
    """Whether some way of going on makes `text` a program."""
    return any(parses(text + ending) for ending in (*rests, *ENDINGS))


GRAMMAR = (
    "with_as", "for_while", "else_elif", "if_ternary", "fstring_brace", "bracket_brace", "while_return_true",
    "lambda_func", "final_kwarg",
)  # fmt: skip
"""Tasks whose foil is a syntax error, whatever comes after it."""


@pytest.mark.parametrize("name", GRAMMAR)
def test_the_answer_makes_a_program_and_the_foil_never_does(name):
    for split in SPLITS:
        for candidate in drawn(name, split):
            for prompt, answer, rest, foil, foil_rest in sides(candidate):
                assert parses(prompt + answer + rest), prompt + answer + rest
                assert not can_go_on(prompt + foil, (foil_rest, rest)), prompt + foil


def test_the_ways_of_going_on_find_the_programs_that_they_are_asked_for():
    for name in GRAMMAR:
        for candidate in drawn(name, "train"):
            for prompt, answer, *_ in sides(candidate):
                assert can_go_on(prompt + answer, ("", "")), prompt + answer


# -- tasks whose foil is a program, but not the one that its names ask for ---------------------------------------------


def last(tree: ast.AST, kind: type) -> ast.AST:
    """The node of that kind that begins last in the program."""
    return max((node for node in ast.walk(tree) if isinstance(node, kind)), key=lambda n: (n.lineno, n.col_offset))


def quote_is_closed(program: str) -> bool:
    """Every string token begins and ends with the same mark, and the program is whole."""
    tokens = list(tokenize.generate_tokens(io.StringIO(program).readline))
    return all(t.string[0] == t.string[-1] for t in tokens if t.type == tokenize.STRING)


def brackets_are_closed(program: str) -> bool:
    """Depth counted by hand, never below nothing on the way and nothing at the end."""
    depth = 0
    for sign in program:
        depth += (sign in "[(") - (sign in "])")
        if depth < 0:
            return False
    return depth == 0


def compares_in_a_condition_and_assigns_elsewhere(program: str) -> bool:
    """No comparison is a statement of its own, whose result nobody would ever see."""
    return parses(program) and not any(
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Compare) for node in ast.walk(ast.parse(program))
    )


def grows_by_what_it_has(program: str) -> bool:
    """The last statement's method or operator works on the value that its variable began with."""
    tree = ast.parse(program)
    step = last(tree, (ast.AugAssign, ast.Call))
    grown = step.target if isinstance(step, ast.AugAssign) else step.func.value
    began = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == ast.unparse(grown)
    ]
    value = eval(ast.unparse(began[0]))
    try:
        if isinstance(step, ast.AugAssign):
            value += "word"
        else:
            getattr(value, step.func.attr)("word")
    except (AttributeError, TypeError):
        return False
    return True


def does_what_it_was_opened_for(program: str, folder) -> bool:
    """A file that is opened in the last mode before the handle's use allows that use."""
    tree = ast.parse(program)
    use = last(tree, ast.Attribute)
    opened = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and "open" in ast.unparse(node.func)]
    call = max(opened, key=lambda node: node.lineno)
    mode = next(value.value for value in [*call.args, *(k.value for k in call.keywords)]
                if isinstance(value, ast.Constant) and value.value in ("r", "w"))  # fmt: skip
    (folder / "file").write_text("text")
    with (folder / "file").open(mode) as file:
        try:
            getattr(file, use.attr)(*([] if use.attr == "read" else ["text"]))
        except io.UnsupportedOperation:
            return False
    return True


def swaps(program: str) -> bool:
    """What stands on the left stands on the right in the other order."""
    step = last(ast.parse(program), ast.Assign)
    left, right = ([ast.unparse(e) for e in side.elts] for side in (step.targets[0], step.value))
    return left == right[::-1]


def fills_in_what_is_missing(program: str) -> bool:
    """The variable in the last condition is the one that the body assigns."""
    step = last(ast.parse(program), ast.If)
    tested = {node.id for node in ast.walk(step.test) if isinstance(node, ast.Name)}
    return tested == {ast.unparse(step.body[0].targets[0])}


def goes_in_by_four(program: str) -> bool:
    """The body of the last loop begins four columns further in than the loop."""
    if not parses(program):
        return False
    loop = last(ast.parse(program), ast.For)
    return loop.body[0].col_offset == loop.col_offset + 4


def takes_what_it_can_name(program: str) -> bool:
    """Two names can be given to each value of the last loop, or else each value is a number."""
    loop = last(ast.parse(program), ast.For)
    values = list({"enumerate": enumerate, "range": lambda n: range(n)}[loop.iter.func.id](
        ITEMS if loop.iter.func.id == "enumerate" else len(ITEMS)))  # fmt: skip
    if isinstance(loop.target, ast.Tuple):
        return all(isinstance(value, tuple) and len(value) == len(loop.target.elts) for value in values)
    return all(isinstance(value, int) for value in values)


def keeps_arguments_under_their_names(program: str) -> bool:
    """The last attribute that is assigned has the name of the argument that it is given."""
    step = last(ast.parse(program), ast.Assign)
    return step.targets[0].attr == step.value.id


MEANING: dict[str, Callable[[str], bool]] = {
    "bracket_counting": brackets_are_closed,
    "set_or_string": grows_by_what_it_has,
    "set_or_string_fixedvarname": grows_by_what_it_has,
    "if_equals": compares_in_a_condition_and_assigns_elsewhere,
    "var_swap": swaps,
    "var_if": fills_in_what_is_missing,
    "indent_for": goes_in_by_four,
    "enumerate_range": takes_what_it_can_name,
    "class_init": keeps_arguments_under_their_names,
}


def check(name: str, holds: Callable[[str], bool]) -> None:
    for split in SPLITS:
        for candidate in drawn(name, split):
            for prompt, answer, rest, foil, foil_rest in sides(candidate):
                assert parses(prompt + answer + rest), prompt + answer + rest
                assert holds(prompt + answer + rest), prompt + answer + rest
                assert not holds(prompt + foil + foil_rest), prompt + foil + foil_rest


@pytest.mark.parametrize("name", MEANING)
def test_the_answer_is_what_the_program_means_and_the_foil_is_not(name):
    check(name, MEANING[name])


def test_a_file_lets_the_answer_be_done_to_it_and_not_the_foil(tmp_path):
    check("with_open", lambda program: does_what_it_was_opened_for(program, tmp_path))


@pytest.mark.parametrize("split", SPLITS)
def test_a_string_is_closed_by_the_answer_and_not_by_the_foil(split):
    source = template_file("single_double_quote")
    for candidate in drawn("single_double_quote", split):
        rest = re.sub(r"\$\w+", "item", source.templates[candidate.template].rest)
        answer, foil = candidate.answers[0]
        for prompt, right, wrong in ((candidate.clean, answer, foil), (candidate.corrupt, foil, answer)):
            assert parses(prompt + right + rest) and quote_is_closed(prompt + right + rest)
            assert not parses(prompt + wrong + rest)


def test_every_python_task_has_such_a_check():
    assert {*GRAMMAR, *MEANING, "with_open", "single_double_quote"} == set(PYTHON_TASKS)
    assert len(PYTHON_TASKS) == 20


def test_comparing_only_ever_stands_where_a_comparison_is_not_thrown_away():
    assert compares_in_a_condition_and_assigns_elsewhere("if a and b == 1:\n    pass")
    assert not compares_in_a_condition_and_assigns_elsewhere("if a: b == 1")
    assert not compares_in_a_condition_and_assigns_elsewhere("if a and b = 1:\n    pass")
