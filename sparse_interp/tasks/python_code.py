"""Twenty small decisions that every reader of Python code makes, as tasks.

The names are those of Gao et al. 2025 (arXiv:2511.13653), table 1. The prompts behind that table are not published; the
ones here are our own, and so is, where a name leaves it open, the choice of the two answers. It is made so that
the prompt decides between them: `tests/tasks/test_python_code.py` has Python itself agree for every task.

    task                         prompt                             answer      edited to               foil

    single_double_quote          x = "name                          "           x = 'name               '
    bracket_counting             x = [[a, b                         ]]          x = [[a], b             ]
    set_or_string                x = set() ... x                    .add        x = '' ... x            +=
    set_or_string_fixedvarname   current = set() ... current        .add        current = '' ...        +=
    with_as                      with open(path)                    as          return open(path)       newline
    with_open                    open(path, "r") as f: f            .read       open(path, "w")         .write
    for_while                    for x                              ,           while x                 :
    else_elif                    if x == 1: ... else                :           if x == 1: ... elif     x
    if_ternary                   y = a or b if c                    else        y = a, newline, if c    :
    if_equals                    if a and b                         ==          if a: b                 =
    fstring_brace                f"{a} {b                           }           f"{a} #b                "
    bracket_brace                x = [a, b                          ]           x = {a, b               }
    var_swap                     a, b = b,                          a           b, a = a,               b
    var_if                       if a is None:                      a           if b is None:           b
    indent_for                   a for eight columns in             12 columns  four columns in         8 columns
    while_return_true            while True                         :           return True             newline
    lambda_func                  f = lambda a, b                    :           f = g(a, b              )
    enumerate_range              for i, x in                        enumerate   for i_x in              range
    final_kwarg                  f(a=b, c                           =           f(a=b or c              )
    class_init                   def __init__(self, a, b): self.a = a           self.b =                b

In most, one of the answers is a syntax error and in the others a program that fails or says something else than
its names do. `else_elif` is decided by the last token, so a bigram table can do it; nothing smaller than a model that
looks back can do the others.

Each is a file of templates, `data/tasks/<name>.json` (the form is explained in `tasks/templates.py`), with identifiers,
messages and file names in the manner of the standard library. In `shifted` the surroundings are longer (imports,
classes, docstrings, earlier branches and loops), the forms others, and so are all names. In single_double_quote no
string came before the open one in train and test; in shifted closed ones did, of either kind.
"""

PYTHON_TASKS = (
    "single_double_quote",
    "bracket_counting",
    "set_or_string",
    "set_or_string_fixedvarname",
    "with_as",
    "with_open",
    "for_while",
    "else_elif",
    "if_ternary",
    "if_equals",
    "fstring_brace",
    "bracket_brace",
    "var_swap",
    "var_if",
    "indent_for",
    "while_return_true",
    "lambda_func",
    "enumerate_range",
    "final_kwarg",
    "class_init",
)
"""The tasks in the order of the paper's table."""
