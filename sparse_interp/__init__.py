"""Weight-sparse transformers, their circuits, and the evidence for them.

The index page: every public name, in the order in which a reader meets them. What is not here is not public.
Importing it runs nothing, prints nothing and sets nothing; libraries that only some functions need (numba,
matplotlib, networkx, jinja2) are imported by those functions when they are called.
"""

__version__ = "0.1.0"

from sparse_interp.errors import BridgeError as BridgeError
from sparse_interp.errors import CheckpointError as CheckpointError
from sparse_interp.errors import CircuitError as CircuitError
from sparse_interp.errors import ConfigError as ConfigError
from sparse_interp.errors import DownloadError as DownloadError
from sparse_interp.errors import SparseInterpError as SparseInterpError
from sparse_interp.errors import TaskError as TaskError
from sparse_interp.errors import TokenizerError as TokenizerError
from sparse_interp.errors import WrongToolWarning as WrongToolWarning
from sparse_interp.results import Table as Table
from sparse_interp.corpus import Document as Document
from sparse_interp.corpus import python_sources as python_sources
from sparse_interp.corpus import text_files as text_files
from sparse_interp.tokenizer import load_tokenizer as load_tokenizer
from sparse_interp.tokenizer import train_tokenizer as train_tokenizer
from sparse_interp.model.config import ModelConfig as ModelConfig
from sparse_interp.model.sites import Node as Node
from sparse_interp.model.sites import NodeValues as NodeValues
from sparse_interp.model.cache import SparseActivationCache as SparseActivationCache
from sparse_interp.model.transformer import HookedSparseTransformer as HookedSparseTransformer
from sparse_interp.model.transformer import load as load
from sparse_interp.model.logits import direct_logit_attribution as direct_logit_attribution
from sparse_interp.model.logits import induction_loss as induction_loss
from sparse_interp.model.zoo import baseline_means as baseline_means
from sparse_interp.model.zoo import models as models
from sparse_interp.model.zoo import validation_blocks as validation_blocks
from sparse_interp.training.recipes import RunConfig as RunConfig
from sparse_interp.training.recipes import recipe as recipe
from sparse_interp.training.text import TrainingText as TrainingText
from sparse_interp.training.text import folder_text as folder_text
from sparse_interp.training.text import python_text as python_text
from sparse_interp.training.loop import train as train
from sparse_interp.tasks.task import Task as Task
from sparse_interp.tasks.task import TaskBatch as TaskBatch
from sparse_interp.tasks.task import logit_difference as logit_difference
from sparse_interp.tasks.library import load_task as task  # noqa: F401 - public under the shorter name
from sparse_interp.tasks.library import tasks as tasks
from sparse_interp.tasks.survey import score_tasks as score_tasks
from sparse_interp.interventions.baselines import Counterfactual as Counterfactual
from sparse_interp.interventions.baselines import Resample as Resample
from sparse_interp.interventions.baselines import mean_activations as mean_activations
from sparse_interp.interventions.baselines import position_means as position_means
from sparse_interp.interventions.baselines import task_means as task_means
from sparse_interp.interventions.baselines import zero_values as zero_values
from sparse_interp.interventions.ablation import Ablation as Ablation
from sparse_interp.interventions.ablation import ablate as ablate
from sparse_interp.interventions.optimal import learn_baseline as learn_baseline
from sparse_interp.interventions.interchange import interchange as interchange
from sparse_interp.interventions.steering import push as push
from sparse_interp.interventions.steering import steer as steer
from sparse_interp.interventions.patching import Head as Head
from sparse_interp.interventions.patching import Receiver as Receiver
from sparse_interp.interventions.patching import patch_direct_paths as patch_direct_paths
from sparse_interp.interventions.patching import receivers_of as receivers_of
from sparse_interp.interventions.node_effects import PatchingTable as PatchingTable
from sparse_interp.interventions.sweeps import patch_nodes as patch_nodes
from sparse_interp.interventions.attribution import attribute_edges as attribute_edges
from sparse_interp.interventions.attribution import attribute_nodes as attribute_nodes
from sparse_interp.interventions.prune_config import PruneConfig as PruneConfig
from sparse_interp.circuit.graph import Circuit as Circuit
from sparse_interp.circuit.find import find_circuit as find_circuit
from sparse_interp.circuit.find_edges import find_edges as find_edges
from sparse_interp.circuit.describe import describe as describe
from sparse_interp.circuit.readings import read_heads as read_heads
from sparse_interp.circuit.knock_outs import knock_outs as knock_outs
from sparse_interp.circuit.showing import page as circuit_page  # noqa: F401 - public under a longer name
from sparse_interp.circuit.calibration import calibrate as calibrate
from sparse_interp.circuit.search import CircuitSearch as CircuitSearch
from sparse_interp.circuit.search import search_circuits as search_circuits
from sparse_interp.circuit.payload import read_means as read_means
from sparse_interp.circuit.payload import read_payload as read_payload
from sparse_interp.circuit.released import released_circuit as released_circuit
from sparse_interp.circuit.released import replay as replay
from sparse_interp.circuit.publishing import publish_circuit as publish_circuit
from sparse_interp.model.publishing import publish_model as publish_model
from sparse_interp.faithfulness.controls import nonsense_twin as nonsense_twin
from sparse_interp.faithfulness.controls import reinitialised as reinitialised
from sparse_interp.faithfulness.controls import teacher_of as teacher_of
from sparse_interp.faithfulness.rivals import Rivals as Rivals
from sparse_interp.faithfulness.rivals import rivals as rivals
from sparse_interp.faithfulness.thresholds import Thresholds as Thresholds
from sparse_interp.faithfulness.audit_table import AuditTable as AuditTable
from sparse_interp.faithfulness.audit import audit as audit
from sparse_interp.faithfulness.adversarial import adversarial_inputs as adversarial_inputs
from sparse_interp.faithfulness.inside import agreement_inside as agreement_inside
from sparse_interp.faithfulness.exchange import exchange_between_prompts as exchange_between_prompts
from sparse_interp.faithfulness.exchange import exchange_between_runs as exchange_between_runs
from sparse_interp.faithfulness.partial import partial_ablation as partial_ablation
from sparse_interp.faithfulness.scrubbing import scrub as scrub
from sparse_interp.faithfulness.recover import recover as recover
from sparse_interp.bridges.bridge_config import BridgeConfig as BridgeConfig
from sparse_interp.bridges.bridge_config import SitePair as SitePair
from sparse_interp.bridges.bridge import Bridge as Bridge
from sparse_interp.bridges.hybrid import hybrid_logits as hybrid_logits
from sparse_interp.bridges.hybrid import sampled_paths as sampled_paths
from sparse_interp.bridges.training import train_bridges as train_bridges
from sparse_interp.bridges.rotated import rotated_twin as rotated_twin
from sparse_interp.bridges.stretches import dense_streams as dense_streams
from sparse_interp.bridges.steering import explain as explain
from sparse_interp.bridges.steering import feature_direction as feature_direction
from sparse_interp.bridges.steering import steer as steer_across  # noqa: F401 - `steer` is one model's own
from sparse_interp.bridges.steering import transfer as transfer
from sparse_interp.bridges.attribution import attribute_across as attribute_across
from sparse_interp.bridges.evaluation import BridgeTable as BridgeTable
from sparse_interp.bridges.evaluation import CausalCase as CausalCase
from sparse_interp.bridges.evaluation import evaluate as evaluate_bridge  # noqa: F401 - public under a longer name
from sparse_interp.bridges.curves import steering_curve as steering_curve
from sparse_interp.tokens import TokenView as TokenView
from sparse_interp.tokens import attention_view as attention_view
from sparse_interp.tokens import token_view as token_view
from sparse_interp.tokens import activation_view as activation_view
from sparse_interp.tokens import top_token_view as top_token_view
