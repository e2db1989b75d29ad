"""Components: a family's own Hugging Face model, pruned to a range of layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from splitlearn_core.build.assemble import refuse_parting
from splitlearn_core.build.bundles import Crossing, bundled, entering_layers, leaving_layers, taken_apart
from splitlearn_core.build.configuration import architecture_class, decoder_config, layer_count_set
from splitlearn_core.build.forward_arguments import (
    RECORDINGS,
    Routing,
    crosses_in_float32,
    is_paged,
    mask_for_layers,
    named_cache,
    routing,
)
from splitlearn_core.build.kv_cache import CACHE_FIELD, PartCache, own_cache_class, part_cache_class
from splitlearn_core.build.pruning import (
    Left,
    check_names,
    entering,
    enters_at_layers,
    leave_out_others,
    leaves_at_layers,
    leaving,
)
from splitlearn_core.checkpoint.origin import Origin
from splitlearn_core.errors import ConfigurationError, UnexpectedArgumentError
from splitlearn_core.family import ModelFamily
from splitlearn_core.plan.crossing import crossing_tensors
from splitlearn_core.plan.splitplan import PlannedTensor
from splitlearn_core.types import Component, LayerRange

#: Token ids are [batch, sequence], hidden states [batch, sequence, hidden], unless the family says otherwise.
_TOKEN_DIMENSIONS, _STATE_DIMENSIONS = 2, 3

_NOTHING: Mapping[str, Any] = MappingProxyType({})
#: What transformers calls the loss of a causal language model.
_LOSS = "ForCausalLM"


class ComponentModel(PreTrainedModel):
    """Base of bottom, trunk and top, which derive from a Hugging Face class too.

    Layers keep their numbers in the whole model, and so do cache slots, adapters and tensor names.
    """

    #: Bottom, trunk or top.
    kind: ClassVar[Component]
    #: Its name: that of its kind, or numbered where there are several trunks.
    component: str
    family: ClassVar[ModelFamily]
    #: The name of the key-value cache in the forward of the Hugging Face class.
    cache_argument: ClassVar[str]
    #: Builds an instance from the tensors of a state dict; set when the class is made, in ``construction``.
    _from_state_dict: ClassVar[Callable[..., Any]]
    #: The layers of the whole model that this component runs.
    layer_range: LayerRange
    #: Where the component comes from; None if it was made from a state dict.
    origin: Origin | None = None
    #: Tensors of the file that tensors of the component were made of; it is saved as those.
    parted: tuple[PlannedTensor, ...] = ()
    #: The names of the attributes that the Hugging Face class gives a model.
    family_attributes: frozenset[str]
    #: Which components need the arguments of the family's forward.
    routing: Routing

    def __init__(self, config: Any, layer_range: LayerRange) -> None:
        built = 1 if self.family.uniform_layers else layer_range.total
        with layer_count_set(self.family, config, built):
            super().__init__(config)
        self.family_attributes = frozenset(vars(self))
        self.layer_range = layer_range
        # transformers derives the loss from the name of the class; if the name contains none (GPT2LMHeadModel), it
        # uses this one, with a warning about the configuration.
        if getattr(self, "loss_type", None) is None:
            self.loss_type = _LOSS
        #: What crosses its cuts; empty if that is hidden states ``[batch, sequence, hidden_size]`` alone.
        self.crossing: Crossing = crossing_tensors(self.family, config.to_dict()) if self.family.crossing else {}
        #: A zero for each argument that the model computes from token ids, which only a bottom has.
        self._zeros = (
            {}
            if self.kind is Component.BOTTOM
            else {
                argument: torch.zeros((), device="cpu")
                for argument, name in self.family.zero_arguments.items()
                if name in self.crossing
            }
        )
        check_names(self, self.family)
        if self.family.text_config:
            leave_out_others(self, self.family)
        forward = architecture_class(self.family).forward
        self.routing = routes = routing(forward, self, self.family)
        own: Any = own_cache_class(self.base_model.forward)
        self._cache_class = part_cache_class(own)
        self._known = (
            routes.everywhere
            | {Component.BOTTOM: routes.bottom, Component.TRUNK: frozenset(), Component.TOP: routes.top}[self.kind]
        )

    @classmethod
    def from_pretrained_split(
        cls,
        full_state_dict: Mapping[str, torch.Tensor],
        config: Any,
        start_layer: int | None = None,
        end_layer: int | None = None,
    ) -> ComponentModel:
        """Make a component from the state dict of a whole model that is in memory.

        Args:
            full_state_dict: Tensors by checkpoint key or module key. Those of the component become
                its parameters, not copies of them.
            config: The whole model's Hugging Face configuration, or the values of its ``config.json``.
            start_layer: The component's first layer; 0 for a bottom.
            end_layer: One past its last; the number of layers for a top.

        Raises:
            ConfigurationError: An argument is not a state dict or configuration; tensors have no memory, or several
                dtypes.
            InvalidSplitError: There are no such layers.
            TensorMismatchError: Tensors are missing, unexpected or mis-shaped; all are listed.
        """
        built: ComponentModel = cls._from_state_dict(
            cls.family, cls.kind, full_state_dict, config, start_layer, end_layer
        )
        return built

    @property
    def start_layer(self) -> int:
        return self.layer_range.start

    @property
    def end_layer(self) -> int:
        return self.layer_range.end

    def new_cache(self) -> PartCache:
        """Return an empty key-value cache for this component's layers."""
        return self._cache_class.empty(self.config, self.layer_range)

    def cache_view(self, whole: Any) -> PartCache:
        """Return a view of this component's layers in a cache of the whole model; both share the layers' state."""
        return self._cache_class.view(whole, self.layer_range)

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype of the parameters; some of them may be in float32 whatever the others are in."""
        dtypes = (parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())
        return next((dtype for dtype in dtypes if dtype != torch.float32), torch.float32)

    @property
    def base_model(self) -> Any:
        """The base module; the family's where the class names one that it does not have, as ``base_of`` has it."""
        # Not by super(), which torch.compile does not follow into a property.
        base = getattr(self, self.base_model_prefix, None)
        return self.get_submodule(self.family.base) if base is None else base

    @property
    def decoder_config(self) -> Any:
        """The configuration of the decoder: that of the model, unless it is a composite model."""
        return decoder_config(self.family, self.config)

    @property
    def layer_modules(self) -> Any:
        """The module whose children are the layers, by their number in the whole model."""
        return self.get_submodule(f"{self.family.base}.{self.family.layers}")

    def init_weights(self) -> None:
        """Do nothing: weights are assigned from a checkpoint."""

    def extra_repr(self) -> str:
        return f"{self.component}, layers {self.layer_range}"

    @classmethod
    def can_generate(cls) -> bool:
        """Return False: a component alone generates no text."""
        return False

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: a component alone generates no text."""
        raise ConfigurationError(
            f"a {self.component} alone cannot generate", hint="use SplitCausalLM(bottom, trunk, top).generate(...)"
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Raise: transformers would load such a checkpoint with random values for the other layers."""
        raise ConfigurationError(
            f"a {self.component} is not saved as a checkpoint of the whole model",
            hint="save it as a component: save_split(component, DIR)",
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load values as any module does; ``assign`` replaces no parameter that another component shares.

        Raises:
            ConfigurationError: It would: embedding and head would no longer be tied.
        """
        if assign:
            refuse_parting(self.component, self, state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: the embedding and the head, which may be in another component, have the same size."""
        raise ConfigurationError(
            f"the vocabulary of a {self.component} alone cannot be resized",
            hint="resize the whole model with transformers, save it, and split the result",
        )

    def _layer_arguments(
        self,
        kwargs: dict[str, Any],
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        past_key_values: Any,
    ) -> dict[str, Any]:
        """Check the arguments other than the input, and name them as the Hugging Face class does."""
        past_key_values = named_cache(kwargs, past_key_values)
        paged = is_paged(past_key_values)
        for name, instead in (("use_cache", "past_key_values=component.new_cache()"), ("return_dict", "nothing")):
            if name in kwargs and not paged:
                raise ConfigurationError(f"a component takes no {name}", hint=f"give {instead} instead")
        for name in self.routing.bottom.intersection(kwargs) if self.kind is not Component.BOTTOM else ():
            # Used by the embeddings only; the family's own code would treat hidden states as embeddings.
            del kwargs[name]
        self.routing.refuse_others(kwargs)
        for name in kwargs:
            # Continuous batching passes read and write positions to the kernels, under names of its own.
            if name not in self._known and not paged:
                raise UnexpectedArgumentError(
                    f"{self.component}.forward() got an unexpected keyword argument {name!r}",
                    hint=f"a {self.component} takes {', '.join(list(inspect.signature(self.forward).parameters)[:-1])}",
                )
        cached = getattr(past_key_values, "layer_range", "all layers")
        if past_key_values is not None and not paged and cached != self.layer_range:
            raise ConfigurationError(
                f"past_key_values is a cache of {cached}; this {self.component} runs layers {self.layer_range}",
                hint=f"use {self.component}.new_cache(); a cache of other layers would give wrong text silently",
            )
        kinds = getattr(self.decoder_config, "layer_types", None)
        return {
            **kwargs,
            "attention_mask": mask_for_layers(attention_mask, kinds, self.layer_range),
            "position_ids": position_ids,
            self.cache_argument: past_key_values,
            "use_cache": past_key_values is not None,
            **self._zeros,
        }

    def _run_layers(
        self, inputs: dict[str, Any], arguments: dict[str, Any], entered: Mapping[str, torch.Tensor] = _NOTHING
    ) -> torch.Tensor | BaseModelOutputWithPast:
        """Run the layers; the result is hidden states alone unless more crosses, or was requested."""
        _check_rows(arguments["attention_mask"], next(tensor for tensor in inputs.values() if tensor is not None))
        # Recordings that the configuration requests are those of the whole model.
        recordings = {name: bool(arguments.get(name)) for name in RECORDINGS if getattr(self.config, name, False)}
        # torch.compile cannot trace a context variable, which only families that need it set.
        stop: AbstractContextManager[list[Left]] = leaving() if leaves_at_layers(self.family) else nullcontext([])
        with stop as left:
            output = self.base_model(**inputs, **{**arguments, **recordings})
        others: Mapping[str, torch.Tensor] = {}
        if left:
            output["last_hidden_state"] = left[0][0]
            if self.crossing:
                own = len(self.layer_range)
                output["last_hidden_state"], others = leaving_layers(self.crossing, left, entered, own)
        self._count_step(arguments, inputs)
        is_recorded = any(arguments.get(name) for name in RECORDINGS)
        result = self._own_recordings(output) if is_recorded else output.last_hidden_state
        return cast("torch.Tensor | BaseModelOutputWithPast", bundled(result, others))

    def _count_step(self, arguments: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        """Count the tokens of a step in its cache: running states do not know how many they have seen."""
        cache = arguments[self.cache_argument]
        if isinstance(cache, PartCache):
            entered = next(tensor for tensor in inputs.values() if tensor is not None)
            cache.advance(entered.shape[1])

    def _own_recordings(self, output: Any) -> Any:
        """Leave out recordings of neutral layers, made by models that record in their own forward."""
        owned = self.layer_range
        states, attentions = output.get("hidden_states"), output.get("attentions")
        if states is not None and len(states) == owned.total + 1:
            output["hidden_states"] = states[owned.start : owned.end + 1]
        if attentions is not None and len(attentions) == owned.total:
            output["attentions"] = attentions[owned.start : owned.end]
        return output

    def _entered(self, states: Any, arguments: dict[str, Any]) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Check hidden states, and take what crosses with them out of the arguments."""
        others: Mapping[str, torch.Tensor] = _NOTHING
        if self.crossing:
            left = self.layer_range.total - self.layer_range.start
            states, others = taken_apart(self.crossing, states, arguments, left)
        return self._checked_states(states, arguments), others

    @contextmanager
    def _past_the_embeddings(
        self, hidden_states: torch.Tensor, others: Mapping[str, torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """Pass hidden states to the layers; yields the tensor that the model takes instead of embeddings."""
        if not enters_at_layers(self.family):
            yield hidden_states
            return
        with entering(entering_layers(self.crossing, hidden_states, others)):
            # A copy, because a model may change its embeddings in place.
            yield (self._like_embeddings(hidden_states) if self.crossing else hidden_states).detach().clone()

    def _like_embeddings(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the shape and dtype of embeddings, from which masks and rotary angles are made."""
        return hidden_states.flatten(2)[..., : self.decoder_config.hidden_size].to(self.weights_dtype)

    def _checked_states(self, hidden_states: Any, others: Mapping[str, Any]) -> torch.Tensor:
        """Refuse anything but hidden states of this model, which the model's own code might accept."""
        if hidden_states is None:
            raise ConfigurationError(
                f"this {self.component} was given {', '.join(others) or 'nothing'} but no hidden_states; it takes "
                f"those of the component before it, [batch, sequence, {self.decoder_config.hidden_size}]",
                hint="give the result of the component before it; token ids (input_ids) go to the bottom",
            )
        if not isinstance(hidden_states, torch.Tensor) or not hidden_states.is_floating_point():
            given = getattr(hidden_states, "dtype", type(hidden_states).__name__)
            raise ConfigurationError(
                f"hidden_states are {given}; a {self.component} takes no token ids",
                hint="give the result of the component before it; token ids go to the bottom",
            )
        width = self.decoder_config.hidden_size
        if not self.crossing and (hidden_states.dim() != _STATE_DIMENSIONS or hidden_states.shape[-1] != width):
            raise ConfigurationError(
                f"hidden_states are {list(hidden_states.shape)}; this {self.component} takes "
                f"[batch, sequence, {width}]",
                hint="give the result of the component before it, unchanged",
            )
        if hidden_states.dtype != next(self.parameters()).dtype and not torch.is_autocast_enabled(
            hidden_states.device.type
        ):
            own = {parameter.dtype for parameter in self.parameters()}
            if crosses_in_float32(self.family, self.decoder_config):
                own.add(torch.float32)
            if hidden_states.dtype not in own:
                names = " and ".join(sorted(map(str, own)))
                raise ConfigurationError(
                    f"hidden_states are {hidden_states.dtype}; the parameters of this {self.component} are {names}",
                    hint=f"load the components with one dtype, or convert: hidden_states.to({names.split(' and ')[0]})",
                )
        return hidden_states


class BottomModel(ComponentModel):
    """The embeddings and the first layers."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | BaseModelOutputWithPast:
        """Run the embeddings and the first layers.

        Args:
            input_ids: Token ids ``[batch, sequence]``.
            inputs_embeds: Instead of token ids, their embeddings ``[batch, sequence, hidden]``.
            attention_mask: 1 for tokens, 0 for padding, ``[batch, past + sequence]``; or a mask
                ``[batch, heads, sequence, past + sequence]``, or a mapping of such masks by type of layer, as
                transformers makes them.
            position_ids: Positions ``[batch, sequence]``; by default they continue from the cache.
            past_key_values: A cache from :meth:`new_cache`; grows by the sequence.

        Returns:
            Hidden states ``[batch, sequence, hidden]``. With ``output_hidden_states`` or ``output_attentions``,
            transformers' own output, in which they are ``last_hidden_state``.
        """
        if "hidden_states" in kwargs:
            raise ConfigurationError("a bottom takes no hidden_states", hint="give input_ids, or inputs_embeds")
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ConfigurationError(
                f"a bottom takes either input_ids or inputs_embeds, and was given {given}",
                hint="give token ids [batch, sequence] as input_ids, or their embeddings as inputs_embeds",
            )
        is_tensor = isinstance(input_ids, torch.Tensor)
        if input_ids is not None and (
            not is_tensor or input_ids.is_floating_point() or input_ids.dim() != _TOKEN_DIMENSIONS
        ):
            given = f"{input_ids.dtype} {list(input_ids.shape)}" if is_tensor else type(input_ids).__name__
            raise ConfigurationError(
                f"input_ids are {given}; a bottom takes token ids [batch, sequence], a tensor of whole numbers",
                hint='tokenizer(text, return_tensors="pt").input_ids makes them; embeddings go to inputs_embeds',
            )
        arguments = self._layer_arguments(kwargs, attention_mask, position_ids, past_key_values)
        try:
            return self._run_layers({"input_ids": input_ids, "inputs_embeds": inputs_embeds}, arguments)
        except IndexError as error:
            # From the embedding; it names neither the token nor the vocabulary.
            if input_ids is not None:
                past = past_key_values.get_seq_length() if isinstance(past_key_values, PartCache) else 0
                self._check_tokens(input_ids, position_ids, past, error)
            raise

    def _check_tokens(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, past: int, error: IndexError
    ) -> None:
        size = self.get_input_embeddings().weight.shape[0]
        outside = input_ids[(input_ids < 0) | (input_ids >= size)]
        if outside.numel():
            raise ConfigurationError(
                f"input_ids contain tokens outside the vocabulary of {size}, such as {outside[0].item()}",
                hint="does the tokenizer belong to this model? Tokens that were added need resize_token_embeddings; "
                "-100 is for labels only",
            ) from error
        limit = getattr(self.decoder_config, "max_position_embeddings", None)
        last = past + input_ids.shape[1] if position_ids is None else int(position_ids.max()) + 1
        # Anything else may be out of range, too.
        if limit is not None and last > limit:
            raise ConfigurationError(
                f"a sequence of {last} tokens exceeds the {limit} positions of this model",
                hint="shorten it, or generate fewer tokens",
            ) from error

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor: ...


class TrunkModel(ComponentModel):
    """The middle layers."""

    def forward(
        self,
        hidden_states: torch.Tensor | None = None,
        *,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | BaseModelOutputWithPast:
        """Run the middle layers.

        Args:
            hidden_states: The result of the component before it, ``[batch, sequence, hidden]``.
            attention_mask: The same as the bottom was given.
            position_ids: The same as the bottom was given.
            past_key_values: A cache from this component's :meth:`new_cache`.

        Returns:
            Hidden states ``[batch, sequence, hidden]``. With ``output_hidden_states`` or ``output_attentions``,
            transformers' own output, in which they are ``last_hidden_state``.
        """
        hidden_states, others = self._entered(hidden_states, kwargs)
        arguments = self._layer_arguments(kwargs, attention_mask, position_ids, past_key_values)
        with self._past_the_embeddings(hidden_states, others) as states:
            return self._run_layers({"inputs_embeds": states}, arguments, others)

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor: ...


if TYPE_CHECKING:

    class TopOutput(CausalLMOutputWithPast):
        """The result of a top: always logits, and a loss if labels were given."""

        logits: torch.Tensor
        loss: Any


class TopModel(ComponentModel):
    """The last layers, the final norm and the head."""

    def forward(
        self,
        hidden_states: torch.Tensor | None = None,
        *,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the last layers, the final norm and the head.

        Args:
            hidden_states: The result of the component before it, ``[batch, sequence, hidden]``.
            attention_mask: The same as the bottom was given.
            position_ids: The same as the bottom was given.
            past_key_values: A cache from this component's :meth:`new_cache`.
            labels: Token ids ``[batch, sequence]``, -100 to ignore; they are shifted inside.
            logits_to_keep: How many last positions get logits; 0 for all.

        Returns:
            ``logits`` ``[batch, sequence, vocabulary]``, the ``loss`` if labels were given, and
            the cache; hidden states and attentions of these layers if they were requested.
        """
        hidden_states, others = self._entered(hidden_states, kwargs)
        arguments = self._layer_arguments(kwargs, attention_mask, position_ids, past_key_values)
        _check_rows(arguments["attention_mask"], hidden_states)
        with self._past_the_embeddings(hidden_states, others) as states:
            output = self._own_recordings(
                super().forward(inputs_embeds=states, labels=labels, logits_to_keep=logits_to_keep, **arguments)
            )
        self._count_step(arguments, {"hidden_states": hidden_states})
        # The output of a class without attention has no such field.
        result = CausalLMOutputWithPast(
            loss=output.loss,
            logits=output.logits,
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
            **{CACHE_FIELD: arguments[self.cache_argument]},
        )
        # Further fields of the family's own output: cross-attentions, for example.
        for name, value in output.items():
            if name not in result and name != CACHE_FIELD:
                result[name] = value
        return result

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> TopOutput: ...

    def without_head(
        self,
        hidden_states: torch.Tensor | None = None,
        *,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | BaseModelOutputWithPast:
        """Run the last layers and the final norm; arguments as of :meth:`forward`, results as of a trunk's."""
        hidden_states, others = self._entered(hidden_states, kwargs)
        arguments = self._layer_arguments(kwargs, attention_mask, position_ids, past_key_values)
        with self._past_the_embeddings(hidden_states, others) as states:
            return self._run_layers({"inputs_embeds": states}, arguments, others)


def _check_rows(mask: Any, entering: torch.Tensor) -> None:
    """Refuse a mask of another batch size: torch would speak of sizes of its own tensors. One row is for all."""
    if isinstance(mask, torch.Tensor) and mask.shape[0] not in (1, entering.shape[0]):
        raise ConfigurationError(
            f"attention_mask is that of {mask.shape[0]} sequences, and the batch has {entering.shape[0]}",
            hint="it has a row for each sequence: take the one that the tokenizer made together with input_ids",
        )
