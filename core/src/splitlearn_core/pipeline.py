"""Bottom, trunk and top as one Hugging Face generation model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from splitlearn_core.adapters import adapter_mismatches
from splitlearn_core.build.cache import CACHE_FIELD, PartCache
from splitlearn_core.build.component import ComponentModel, named_cache, refuse_recordings
from splitlearn_core.errors import ConfigurationError
from splitlearn_core.origin import origin_mismatches
from splitlearn_core.types import Component


class SplitCausalLM(PreTrainedModel, GenerationMixin):
    """Runs bottom, trunk and top one after the other; generates as the unsplit model does.

    Args:
        bottom: The component with the embeddings; None, a part that was not loaded, is refused like any other misfit.
        trunk: The component with the middle layers.
        top: The component with the head.
        mixed_dtypes: Let the components have different dtypes. At each cut, hidden states are then
            cast to the dtype of the component that they enter. Without it, different dtypes are taken
            for a mistake.

    Raises:
        ConfigurationError: The components do not make up one model.
    """

    # The components have made this choice; nothing of it is left to this class.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def __init__(
        self,
        bottom: ComponentModel | None,
        trunk: ComponentModel | None,
        top: ComponentModel | None,
        *,
        mixed_dtypes: bool = False,
    ) -> None:
        bottom, trunk, top = _fitting(bottom, trunk, top, mixed_dtypes)
        super().__init__(top.config)
        self.bottom, self.trunk, self.top = bottom, trunk, top
        self._mixed_dtypes = mixed_dtypes
        # What the checkpoint says about generation came with the top; without it, the model's own.
        self.generation_config = getattr(top, "generation_config", None) or GenerationConfig.from_model_config(
            top.config
        )
        self.all_tied_weights_keys: dict[str, str] = {}
        self.training = top.training
        # One parameter of each, to know device and dtype without a walk over the module at every token.
        self._probes = tuple(next(part.parameters()) for part in self.components)

    if TYPE_CHECKING:
        # transformers types its own for a protocol of which models have not all; what it returns depends on arguments.
        def generate(self, *args: Any, **kwargs: Any) -> Any: ...

    @property
    def components(self) -> tuple[ComponentModel, ComponentModel, ComponentModel]:
        """The three components, in the order in which hidden states pass through them."""
        return self.bottom, self.trunk, self.top

    @property
    def device(self) -> torch.device:
        """Where token ids go: the bottom's device."""
        device: torch.device = self._probes[0].device
        return device

    def get_input_embeddings(self) -> Any:
        return self.bottom.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.top.get_output_embeddings()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[torch.Tensor, ...]:
        """Run the whole model; arguments and result are those of the family's own class.

        Args:
            input_ids: Token ids ``[batch, sequence]``.
            attention_mask: 1 for tokens, 0 for padding, ``[batch, past + sequence]``.
            position_ids: Positions ``[batch, sequence]``.
            past_key_values: A cache of the whole model; each component uses its own layers of it.
            inputs_embeds: Instead of token ids, their embeddings.
            labels: Token ids ``[batch, sequence]``; they are shifted inside.
            use_cache: Whether to return a cache; by default what the configuration says.
            logits_to_keep: How many last positions get logits; 0 for all.
            return_dict: False for a plain tuple.
            cache: ``past_key_values`` by the name that transformers gives it from 5.24 on.
        """
        refuse_recordings(kwargs)
        # Of generate with stop_strings: transformers hands it on to the model, whose forward ignores it.
        kwargs.pop("tokenizer", None)
        past_key_values = named_cache({"cache": cache}, past_key_values)
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        caches = [self._part_of(past_key_values, component) for component in self.components]
        common: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids}
        if "cache_position" in kwargs:
            common["cache_position"] = kwargs.pop("cache_position")
        hidden = self.bottom(input_ids, inputs_embeds=inputs_embeds, past_key_values=caches[0], **common)
        common = _move(common, self._probes[1].device)
        hidden = self.trunk(self._enter(1, hidden), past_key_values=caches[1], **common)
        common = _move({**common, "labels": labels}, self._probes[2].device)
        output: CausalLMOutputWithPast = self.top(
            self._enter(2, hidden),
            past_key_values=caches[2],
            logits_to_keep=logits_to_keep,
            **common,
            **kwargs,
        )
        setattr(output, CACHE_FIELD, past_key_values)
        return output.to_tuple() if return_dict is False else output

    def _enter(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """Take hidden states over a cut: to the next component's device, and to its dtype where those may differ."""
        probe = self._probes[number]
        return hidden.to(probe.device, probe.dtype) if self._mixed_dtypes else hidden.to(probe.device)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Turn checkpointing on in each component, by its newer name."""
        for component in self.components:
            component.activation_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Turn checkpointing off in each component, by its newer name."""
        for component in self.components:
            component.activation_checkpointing_disable()

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Turn gradient checkpointing on in each component; arguments as of Hugging Face models."""
        for component in self.components:
            component.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Turn gradient checkpointing off in each component."""
        for component in self.components:
            component.gradient_checkpointing_disable()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: three components in one file are a checkpoint that nothing could load."""
        raise ConfigurationError(
            "a split model is not saved as one checkpoint",
            hint="save its components, each into a folder of its own: save_split(model, DIR)",
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the embedding and the head are two components'."""
        raise ConfigurationError(
            "the vocabulary of a split model cannot be resized",
            hint="resize the whole model with transformers, save it, and split the result",
        )

    def _part_of(self, cache: Cache | None, component: ComponentModel) -> PartCache | None:
        if cache is None:
            return None
        refusal = _cache_refusal(cache)
        if refusal:
            raise ConfigurationError(
                f"a split model cannot use {refusal}",
                hint="use DynamicCache(config=model.config), or leave past_key_values and cache_implementation out",
            )
        return PartCache.view(cache, component.layer_range)


def _cache_refusal(cache: Any) -> str:
    if not isinstance(cache, Cache):
        return f"a {type(cache).__name__} as a cache"
    if cache.offloading:
        return "an offloaded cache"
    return f"a static cache ({type(cache).__name__})" if cache.is_compileable else ""


def _move(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def _kind(part: object) -> str:
    return str(getattr(part, "component", type(part).__name__))


def _fitting(
    bottom: ComponentModel | None, trunk: ComponentModel | None, top: ComponentModel | None, mixed_dtypes: bool
) -> tuple[ComponentModel, ComponentModel, ComponentModel]:
    given: dict[str, Any] = {"bottom": bottom, "trunk": trunk, "top": top}
    problems = [
        f"{name} is {'None: it was not loaded' if part is None else f'a {_kind(part)}'}"
        for name, part in given.items()
        if getattr(part, "component", None) != Component(name)
    ]
    if not problems:
        edges = [part.layer_range for part in given.values()]
        if not (edges[0].is_first and edges[0].end == edges[1].start and edges[1].end == edges[2].start):
            problems.append(f"their layers do not follow one another: {', '.join(map(str, edges))}")
        if not edges[2].is_last or len({edge.total for edge in edges}) > 1:
            problems.append(f"they are of models of different depth: {', '.join(map(str, edges))}")
        facts = {
            what: [getattr(part.config, what) for part in given.values()]
            for what in ("model_type", "hidden_size", "vocab_size")
        }
        # Of the parameters, not of the configuration, which .to(dtype) leaves as it was.
        if not mixed_dtypes:
            facts["dtype"] = [next(part.parameters()).dtype for part in given.values()]
        for what, values in facts.items():
            if len(set(values)) > 1:
                problems.append(f"their {what} differs: {', '.join(map(str, values))}")
        # Those that were made of a state dict are judged by their shape alone.
        problems += origin_mismatches([part.origin for part in given.values() if part.origin is not None], dtypes=False)
        problems += adapter_mismatches(given.values())
    if problems:
        raise ConfigurationError(
            f"these components make up no model: {'; '.join(problems)}",
            hint="load bottom, trunk and top of one checkpoint with the same split points"
            + ("; mixed_dtypes=True where dtypes differ on purpose" if any("dtype" in p for p in problems) else ""),
        )
    return given["bottom"], given["trunk"], given["top"]
