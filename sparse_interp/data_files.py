"""Where the files that ship with the library are found: templates, tokenizers, bundled models.

An installed wheel carries them as `sparse_interp/_data`; a checkout has them in `data/`, beside the package.
"""

from pathlib import Path

from sparse_interp.errors import DownloadError

PACKAGE = Path(__file__).parent


def data_folder() -> Path:
    """The folder that holds `models/`, `tasks/` and `tokenizers/`: the packaged one, else the checkout's."""
    packaged, checkout = PACKAGE / "_data", PACKAGE.parent / "data"
    for folder in (packaged, checkout):
        if folder.is_dir():
            return folder
    raise DownloadError(
        f"sparse_interp's data files are missing: neither {packaged} nor {checkout} is a folder; "
        "install the library again from its wheel, or work from a whole checkout."
    )
