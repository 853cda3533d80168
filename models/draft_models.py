"""The small models that draft for others. An app whose draft model cannot be had answers without it."""

import logging
from typing import TYPE_CHECKING

from config import Settings
from swarm.errors import ModelUnavailable

if TYPE_CHECKING:
    from swarm.client.model import SwarmModel

log = logging.getLogger(__name__)


def load_draft_model(settings: Settings, model: "SwarmModel") -> str | None:
    """Load what drafts for a model, if anything is to.

    :returns: why it is not used; None if it is, or if there is none
    """
    name = settings.draft_models.get(model.name)
    if name is None or settings.DRAFTING == "off":
        return None
    from swarm.client.draft_model import DraftModel

    try:
        model.draft_model = DraftModel.load(
            name,
            model.tokenizer.get_vocab(),
            model.head.vocab_size,
            cache_dir=settings.cache_dir,
            device=settings.device(),
            torch_dtype=settings.torch_dtype(),
        )
    except ModelUnavailable as error:
        log.error("%s: %s", model.name, error)
        return str(error)
    return None
