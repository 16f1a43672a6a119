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
