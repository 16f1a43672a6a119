"""Tasks: paired prompts with a right and a wrong next token, and what is measured on them."""

from sparse_interp.tasks.controls import nonsense as nonsense
from sparse_interp.tasks.controls import relabelled as relabelled
from sparse_interp.tasks.controls import shuffled as shuffled
from sparse_interp.tasks.library import load_task as load_task
from sparse_interp.tasks.library import task_names as task_names
from sparse_interp.tasks.library import tasks as tasks
from sparse_interp.tasks.pairs import Pair as Pair
from sparse_interp.tasks.survey import score_tasks as score_tasks
from sparse_interp.tasks.task import Metric as Metric
from sparse_interp.tasks.task import Task as Task
from sparse_interp.tasks.task import TaskBatch as TaskBatch
from sparse_interp.tasks.task import answer_loss as answer_loss
from sparse_interp.tasks.task import at_answer as at_answer
from sparse_interp.tasks.task import is_argmax as is_argmax
from sparse_interp.tasks.task import is_correct as is_correct
from sparse_interp.tasks.task import kl_divergence as kl_divergence
from sparse_interp.tasks.task import kl_to as kl_to
from sparse_interp.tasks.task import logit_difference as logit_difference
