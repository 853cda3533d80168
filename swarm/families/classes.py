"""Classes of petals for a family of Transformers: configuration, block, and the client's two ends of the model."""

import functools
import os
import sys
from typing import Any

import swarm.compat  # noqa: F401
from swarm.compat import transformers5

import torch
from petals.client.config import ClientConfig
from petals.client.from_pretrained import FromPretrainedMixin
from petals.client.lm_head import LMHead, LMHeadConfig
from petals.client.ptune import PTuneConfig, PTuneMixin
from petals.client.remote_generation import RemoteGenerationMixin
from petals.client.remote_sequential import RemoteSequential
from petals.utils import auto_config
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.models.bloom.modeling_bloom import BloomForCausalLM, BloomModel
from transformers.models.falcon.modeling_falcon import FalconForCausalLM, FalconModel
from transformers.utils import ModelOutput

from swarm.families.layers import SwarmLayer
from swarm.families.quantised import check_ends


class FamilyConfig(ClientConfig, PTuneConfig, LMHeadConfig):
    """What petals wants to know of a model beside what Transformers does. Mixed into Transformers' configuration."""

    block_class: type[Any]
    attn_class: type[Any]
    block_prefix = "model.layers"
    num_attention_heads: int
    num_key_value_heads: int

    @property
    def num_key_value_groups(self) -> int:
        """Query heads that share a key/value head."""
        return self.num_attention_heads // self.num_key_value_heads


class Scale(nn.Module):
    """Multiplies the embeddings, in families that do so outside of the embeddings' module."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings if self.factor == 1.0 else embeddings * self.factor


class FamilyModel:
    """A model whose layers the swarm computes. Mixed into Transformers' model, before it.

    Its parts have the names that petals gives those of all its models, which are BLOOM's.
    """

    layers_name: str  # Transformers' name of the list of layers
    config: Any
    word_embeddings: Any
    word_embeddings_layernorm: Any
    h: Any
    ln_f: Any

    def __init__(self, config: Any, *, dht: Any = None) -> None:
        layers, config.num_hidden_layers = config.num_hidden_layers, 0  # Transformers makes none
        super().__init__(config)  # type: ignore[call-arg]
        config.num_hidden_layers = layers
        setattr(self, self.layers_name, RemoteSequential(config, dht=dht))
        model: Any = self
        model.requires_grad_(False)
        model.init_prompts(config)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **options: Any,
    ) -> ModelOutput:
        """Compute the model for petals' own ``generate`` and for training.

        :param input_ids: [batch, tokens]; or ``inputs_embeds``, [batch, tokens, hidden size]
        :raises ValueError: if the mask hides anything: servers know only causal masks
        """
        if attention_mask is not None and not bool((attention_mask == 1).all()):
            raise ValueError("attention masks other than causal ones are not supported")
        model: Any = self
        hidden = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        prompts, skipped = None, 0
        if self.config.tuning_mode and "ptune" in self.config.tuning_mode and self.h.position == 0:
            first, prompts = model.get_prompt(len(hidden))
            hidden, skipped = torch.cat([first, hidden], dim=1), first.shape[1]
        hidden = self.word_embeddings_layernorm(hidden)
        hidden = self.h(hidden, prompts=prompts, hypo_ids=getattr(cache, "hypo_ids", None))
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.ln_f(hidden[:, skipped:]), cache=transformers5.RemotePastKeyValues()
        )


class BloomNames(FamilyModel):
    """Transformers' own names of the parts are petals', but for those that a family does not have."""

    layers_name = "h"

    def __init__(self, config: Any, *, dht: Any = None) -> None:
        super().__init__(config, dht=dht)
        if not hasattr(self, "word_embeddings_layernorm"):
            self.word_embeddings_layernorm = nn.Identity()


class LlamaNames(FamilyModel):
    """Petals' names for the parts of a model that has Llama's."""

    layers_name = "layers"
    layers: RemoteSequential
    embed_tokens: nn.Module
    norm: nn.Module

    def __init__(self, config: Any, *, dht: Any = None) -> None:
        super().__init__(config, dht=dht)
        self.embedding_scale = Scale(getattr(config, "embedding_multiplier", 1.0))

    @property
    def word_embeddings(self) -> nn.Module:
        return self.embed_tokens

    @property
    def word_embeddings_layernorm(self) -> nn.Module:
        return self.embedding_scale

    @property
    def h(self) -> RemoteSequential:
        return self.layers

    @property
    def ln_f(self) -> nn.Module:
        return self.norm


class FamilyCausalLM:
    """A language model whose layers the swarm computes. Mixed into Transformers', before it."""

    lm_head: nn.Module

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


class LlamaCausalNames(FamilyCausalLM):
    """Petals' name for the model of a language model that has Llama's."""

    model: FamilyModel

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """Load the model as Transformers does.

        :raises ModelUnavailable: if its embeddings or head are quantised
        """
        loader: Any = super()
        model, info = loader.from_pretrained(path, *args, output_loading_info=True, **options)
        check_ends(str(path), info["unexpected_keys"])
        return (model, info) if output_loading_info else model

    @property
    def transformer(self) -> FamilyModel:
        return self.model


def restore_clients() -> None:
    """Replace petals' client classes of BLOOM and Falcon, whose ``forward`` Transformers 5 does not accept."""
    for stem, base, causal in (("Bloom", BloomModel, BloomForCausalLM), ("Falcon", FalconModel, FalconForCausalLM)):
        known: Any = auto_config._CLASS_MAPPING[stem.lower()]
        if not issubclass(known.model, FamilyModel):
            use_classes(stem, base, causal, known.config, BloomNames, FamilyCausalLM)


@functools.cache
def register(model_type: str) -> type[Any]:
    """Let petals know a family, in place of its own classes if it has some; return the configuration's class.

    :param model_type: Transformers' name of the family, whose decoder layer uses its attention interface
    """
    base_config = CONFIG_MAPPING[model_type]
    base, causal = MODEL_MAPPING[base_config], MODEL_FOR_CAUSAL_LM_MAPPING[base_config]
    module: Any = sys.modules[base.__module__]
    layer = getattr(module, next(iter(base._no_split_modules)))
    stem = layer.__name__.removesuffix("DecoderLayer")
    rotary = getattr(module, f"{stem}RotaryEmbedding")
    attributes = {
        "__module__": __name__,
        "model_type": model_type,
        "block_class": type(f"{stem}Block", (SwarmLayer, layer), {"rotary_class": rotary}),
        "attn_class": getattr(module, f"{stem}Attention"),
    }
    config: Any = type(f"Distributed{stem}Config", (base_config, FamilyConfig), attributes)
    config.from_pretrained = classmethod(functools.partial(_read_config, base_config))
    use_classes(stem, base, causal, config, LlamaNames, LlamaCausalNames)
    return config


def use_classes(
    stem: str, base: Any, causal: Any, config: Any, names: type[FamilyModel], causal_names: type[FamilyCausalLM]
) -> None:
    """Let petals use these classes for a family.

    :param stem: how the classes' names begin
    :param base: Transformers' model
    :param causal: Transformers' language model
    """
    model = _model_class(stem, names, base, config)
    auto_config._CLASS_MAPPING.pop(config.model_type, None)
    auto_config.register_model_classes(
        config=config, model=model, model_for_causal_lm=_causal_class(stem, causal_names, causal, model)
    )


def _read_config(base: Any, cls: Any, path: Any, *args: Any, dht_prefix: str | None = None, **options: Any) -> Any:
    """Read a configuration, and name the blocks of a model of the hub as all servers do.

    Blocks are dequantised by ``quantisation``, see ``swarm.families.quantised``.
    """
    if dht_prefix is None and path is not None and not os.path.isdir(path):
        dht_prefix = hub_prefix(cls.model_type, str(path))
    result = super(base, cls).from_pretrained(path, *args, dht_prefix=dht_prefix, **options)
    config = result[0] if isinstance(result, tuple) else result
    config.use_cache = True
    # Out of Transformers' sight, which would make modules that compute with quantised weights.
    config.quantisation = config.__dict__.pop("quantization_config", None)
    return result


def hub_prefix(model_type: str, name: str) -> str:
    """Return the prefix of the blocks' names in the DHT as stock petals forms it; "." separates them from numbers.

    Petals keeps the owner for Mixtral, adds "-hf" to Llama's, and takes the last part for the others that it knows. It
    has no servers of other families: these are named by their last part as well.
    """
    if model_type == "mixtral":
        return name.replace(".", "-")
    last = name.rpartition("/")[2].replace(".", "-")
    return last if model_type != "llama" or last.endswith("-hf") else f"{last}-hf"


def _model_class(stem: str, names: type[FamilyModel], base: Any, config: Any) -> type[Any]:
    attributes = {
        "__module__": __name__,
        "config_class": config,
        "_keys_to_ignore_on_load_missing": PTuneMixin._keys_to_ignore_on_load_missing,
        "_keys_to_ignore_on_load_unexpected": [rf"^(model\.|transformer\.)?{names.layers_name}\."],
    }
    return type(f"Distributed{stem}Model", (names, FromPretrainedMixin, PTuneMixin, base), attributes)


def _causal_class(stem: str, names: type[FamilyCausalLM], causal: Any, model: Any) -> type[Any]:
    def __init__(self: Any, config: Any) -> None:
        super(causal, self).__init__(config)  # not the class's own, which would make all layers
        setattr(self, causal.base_model_prefix, model(config))
        self.vocab_size = config.vocab_size
        self.lm_head = LMHead(config)
        self.post_init()

    attributes = {
        "__module__": __name__,
        "__init__": __init__,
        "config_class": model.config_class,
        "_keys_to_ignore_on_load_missing": model._keys_to_ignore_on_load_missing,
        "_keys_to_ignore_on_load_unexpected": model._keys_to_ignore_on_load_unexpected,
    }
    bases = (names, FromPretrainedMixin, RemoteGenerationMixin, causal)
    return type(f"Distributed{stem}ForCausalLM", bases, attributes)
