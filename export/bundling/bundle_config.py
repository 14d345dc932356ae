"""What a recipe says about its bundles."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from distill.config import Config
from distill.errors import UserError
from export.artifact import Precision
from export.bundling.golden import SAME, SOURCE, Tolerance
from export.bundling.keys import PrivateKey, read_private


class BundleConfig(Config):
    """What goes into a bundle.

    Attributes:
        targets: the artifacts to include; none: all that were exported, without those of other people's quantizers.
        golden_images: how many images the self-test compares.
        tolerances: per precision, for expected outputs that the artifact computed itself. What is left out is `golden.SAME`.
        source_tolerances: for those from what an artifact was made from, where it could not run. Left out: `golden.SOURCE`.
        heads: the heads that the run's evaluations trained on this student: `true` for all that can be served, `false` for none, or
            names of tasks (`main` is the classifier of the recipe's own gallery).
        preprocess_in_graph: beside each ONNX file a second one that takes uint8 pictures of any size and preprocesses them itself.
            Not for OpenVINO below FP32, whose plugin would compute the resize in that precision too.
        layout: how the files lie in the archive.
        sign_key: the private key (`decant keygen`) that signs every bundle of the run; relative to where the command runs. Of an
            encrypted one the passphrase is in the environment variable DECANT_KEY_PASSPHRASE.
    """

    targets: list[str] | None = None
    golden_images: int = 4
    tolerances: dict[Precision, Tolerance] = Field(default_factory=dict)
    source_tolerances: dict[Precision, Tolerance] = Field(default_factory=dict)
    heads: bool | list[str] = True
    preprocess_in_graph: bool = False
    layout: Literal["plain"] = "plain"
    sign_key: str | None = None

    def problems(self) -> list[str]:
        """What contradicts itself in these settings, one sentence each."""
        found = []
        if not 1 <= self.golden_images <= 64:
            found.append(f"golden_images must lie in 1..64, got {self.golden_images}")
        if self.targets is not None and (not self.targets or len(set(self.targets)) < len(self.targets)):
            found.append("targets must name at least one artifact, and each once; leave it out for all")
        if isinstance(self.heads, list) and (not self.heads or len(set(self.heads)) < len(self.heads)):
            found.append("heads must name at least one task, and each once; or be true (all) or false (none)")
        for name, given in (("tolerances", self.tolerances), ("source_tolerances", self.source_tolerances)):
            for precision, tolerance in given.items():
                if not (-1 <= tolerance.cosine_min <= 1 and 0 <= tolerance.max_abs < float("inf")):
                    found.append(f"{name}.{precision}: cosine_min must lie in -1..1 and max_abs be at least 0")
        try:  # now, not after hours of training
            self.key()
        except UserError as e:
            found.append(f"sign_key cannot be used: {e}")
        return found

    def key(self) -> PrivateKey | None:
        """The key that signs.

        Raises:
            UserError: it cannot be read.
        """
        return None if self.sign_key is None else read_private(Path(self.sign_key).expanduser())

    def tolerance(self, precision: Precision, same: bool) -> Tolerance:
        """For outputs of the artifact itself (`same`) or of its source."""
        given, default = (self.tolerances, SAME) if same else (self.source_tolerances, SOURCE)
        return given.get(precision, default[precision])
