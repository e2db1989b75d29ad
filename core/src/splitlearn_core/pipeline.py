"""Components as one Hugging Face generation model."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from splitlearn_core.adapters.peft_models import adapter_mismatches, refuse_adapters
from splitlearn_core.api import load_split_model
from splitlearn_core.build.assemble import keeping_ties
from splitlearn_core.build.component import ComponentModel
from splitlearn_core.build.configuration import architecture_class, decoder_config
from splitlearn_core.build.forward_arguments import named_cache
from splitlearn_core.build.module_tree import LinkedModules, class_over, module_tree, places_of
from splitlearn_core.checkpoint.manifest import holds_components
from splitlearn_core.checkpoint.origin import origin_mismatches
from splitlearn_core.component_chain import AnyComponent, ComponentChain
from splitlearn_core.cuts.crossings import Crossings, generating
from splitlearn_core.cuts.cut import Cut
from splitlearn_core.cuts.ledger import PrivacyLedger
from splitlearn_core.errors import ConfigurationError
from splitlearn_core.hosts.remote import RemoteComponent
from splitlearn_core.hosts.remote_limits import declare_length, refuse_cast
from splitlearn_core.plan.mismatch import without_others_words
from splitlearn_core.storage.local_parts import save_local_parts
from splitlearn_core.storage.saved_components import load_split_directory
from splitlearn_core.types import (
    THREE,
    Component,
    component_names,
    is_component_name,
    kind_of,
    place_of,
)

log = logging.getLogger(__name__)

#: Arguments of generate by which tokens are drafted, and removed from the cache if they are not accepted.
_DRAFTS = ("assistant_model", "prompt_lookup_num_tokens")


class Backbone(PreTrainedModel):
    """The family's base model, whose layers are the components': ``model.model`` of a split Qwen2, say.

    Calling it runs the components up to the final norm, and returns what the base model returns.
    """

    _chain: ComponentChain

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the components without the head; arguments and result are those of the family's base model."""
        return self._chain.run(self, args, kwargs, head=False)


class SplitCausalLM(PreTrainedModel, GenerationMixin):
    """Runs components one after the other, from bottom to top; it is an instance of the family's own class too.

    Code that inspects the class, the loss, the signature of the forward, the base model or a parameter by name
    sees the unsplit model's; the modules and parameters are those of the components.

    Args:
        bottom: The component with the embeddings. None, for a part that was not loaded, is refused like any mismatch.
        following: The trunks, in order: none, one or several; then the top, with the head.
        named: Components given by name instead: ``trunk``, or ``trunk1``, ``trunk2``, ...; and ``top``.
        mixed_dtypes: Let the components have different dtypes. At each cut, hidden states are then
            cast to the dtype of the component that they enter. Without it, different dtypes are
            refused.
        cuts: The treatment of hidden states and gradients that leave the data owner, one for each cut.
        ledger: Counts what is released at the cuts; by default a new one, ``model.ledger``.

    Raises:
        ConfigurationError: The components do not form one model, or the cuts do not fit them.
    """

    _chain: ComponentChain
    #: The family's own class; an instance is an instance of it too.
    family_class: ClassVar[type[Any]]
    #: The positional arguments of its forward.
    places: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let a subclass that names a family's configuration class inherit from the family's own class."""
        config_class = vars(cls).get("config_class")
        super().__init_subclass__(**kwargs)
        family_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None) if config_class is not None else None
        if family_class is None or issubclass(cls, family_class):
            return
        cls.__bases__ = (*cls.__bases__, family_class)
        cls.family_class, cls.places = family_class, places_of(family_class)
        if cls.forward is SplitCausalLM.forward:
            cls.forward = _with_signature_of(family_class)  # type: ignore[method-assign]  # the same, by other names

    def __init__(
        self,
        bottom: ComponentModel | None = None,
        *following: AnyComponent | None,
        mixed_dtypes: bool = False,
        cuts: Sequence[Cut] | None = None,
        ledger: PrivacyLedger | None = None,
        **named: AnyComponent | None,
    ) -> None:
        if isinstance(bottom, list | tuple):
            raise ConfigurationError(
                f"SplitCausalLM takes components, and was given a {type(bottom).__name__} of {len(bottom)}",
                hint="give them one by one: SplitCausalLM(*parts)",
            )
        ordered = [bottom, *following, *_in_order(type(self), named)]
        # A single component is named as one of two in the error.
        parts: dict[str, Any] = dict(zip(component_names(max(len(ordered), 2)), [*ordered, None], strict=False))
        _check_fit(parts, mixed_dtypes)
        crossings = None if cuts is None and ledger is None else Crossings(cuts or (), len(parts) - 1, ledger)
        top = parts[Component.TOP]
        if crossings is not None and top.crossing:
            raise ConfigurationError(
                f"cuts and ledger treat hidden states [batch, sequence, hidden] alone; of a {top.family.model_type} "
                f"model {', '.join(top.crossing)} cross",
                hint="leave cuts and ledger out; what crosses is then sent as it is",
            )
        config, training = top.config, top.training
        family_class = architecture_class(top.family)
        if not isinstance(self, family_class):
            combined = class_over(type(self), family_class)
            if combined.forward is SplitCausalLM.forward:
                combined.forward = _with_signature_of(family_class)
            object.__setattr__(self, "__class__", combined)
        PreTrainedModel.__init__(self, config)
        self.training = training
        # The checkpoint's generation settings come with the top; without it, the model's own are used.
        stated = getattr(top, "generation_config", None)
        self.generation_config = stated or GenerationConfig.from_model_config(config)
        self._assemble(parts, mixed_dtypes, crossings)
        for part in parts.values():
            if isinstance(part, RemoteComponent):
                part.report_differences(config, self.device)

    def _assemble(self, parts: dict[str, Any], mixed_dtypes: bool, crossings: Crossings | None) -> None:
        """Build the module tree of the unsplit model from the modules of the components."""
        top = parts[Component.TOP]
        device = next(parts[Component.BOTTOM].parameters()).device
        for part in parts.values():
            if isinstance(part, RemoteComponent):
                part.open_layers(top.family, top.config, device)
        ours = self.__dict__
        # Attributes that the family's own class sets and its methods rely on.
        own = {"loss_type", "generation_config", "training", *nn.Module().__dict__}
        ours.update({name: getattr(top, name) for name in top.family_attributes if name not in own})
        self._chain = ComponentChain(parts, mixed_dtypes, crossings)
        ours["_modules"] = module_tree(parts, Backbone, {"_chain": self._chain})
        # Components of two separate loads have one copy each, which nothing keeps equal.
        tied = self.get_expanded_tied_weights_keys(all_submodels=True)
        self.all_tied_weights_keys = {
            target: source
            for target, source in tied.items()
            if self.get_parameter(target) is self.get_parameter(source)
        }

    def __setattr__(self, name: str, value: Any) -> None:
        if not is_component_name(name):
            if name == "peft_config":
                # Set by PEFT once its modules are there.
                for part in self.components:
                    if isinstance(part, RemoteComponent):
                        part.adapt(value)
            super().__setattr__(name, value)
            return
        if name not in self._chain.parts:
            raise AttributeError(self._lacks(name))
        parts = {**self._chain.parts, name: value}
        _check_fit(parts, self._chain.mixed_dtypes)
        self._assemble(parts, self._chain.mixed_dtypes, self._chain.crossings)

    if not TYPE_CHECKING:  # a type checker is to know the attributes of the class

        def __getattr__(self, name: str) -> Any:
            """Return one of several trunks, ``model.trunk2``, or a submodule, parameter or buffer."""
            if is_component_name(name):
                if name not in self._chain.parts:
                    raise AttributeError(self._lacks(name))
                return self._chain.parts[name]
            return super().__getattr__(name)

    def _lacks(self, name: str) -> str:
        return f"this split model has no {name}: its components are {', '.join(self._chain.parts)}"

    @property
    def bottom(self) -> ComponentModel:
        """The component with the embeddings."""
        return cast("ComponentModel", self._chain.parts[Component.BOTTOM])

    @property
    def trunk(self) -> AnyComponent:
        """The component with the middle layers, if there is exactly one; otherwise see :attr:`trunks`."""
        if Component.TRUNK not in self._chain.parts:
            raise AttributeError(self._lacks(Component.TRUNK))
        return self._chain.parts[Component.TRUNK]

    @property
    def trunks(self) -> tuple[AnyComponent, ...]:
        """The components between bottom and top, in order."""
        return self.components[1:-1]

    @property
    def top(self) -> ComponentModel:
        """The component with the head."""
        return cast("ComponentModel", self._chain.parts[Component.TOP])

    @property
    def components(self) -> tuple[AnyComponent, ...]:
        """All components, in the order in which hidden states pass through them."""
        return tuple(self._chain.parts.values())

    @property
    def ledger(self) -> PrivacyLedger:
        """The ledger of what was released at the cuts; an error without ``cuts``, since nothing is counted then."""
        if self._chain.crossings is None:
            raise ConfigurationError("this split model was made without cuts=[Cut(), ...], and counts no releases")
        return self._chain.crossings.ledger

    @property
    def device(self) -> torch.device:
        """The device for token ids: the bottom's."""
        return self._chain.device(0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the whole model; arguments and result are those of the family's own class.

        Args:
            input_ids: Token ids ``[batch, sequence]``.
            attention_mask: 1 for tokens, 0 for padding, ``[batch, past + sequence]``; or a mask
                ``[batch, heads, sequence, past + sequence]``, or a mapping of such by type of layer.
            position_ids: Positions ``[batch, sequence]``.
            past_key_values: A cache of the whole model; each component uses its own layers of it.
            cache: ``past_key_values`` by the name that transformers gives it from 5.24 on.
            inputs_embeds: Instead of token ids, their embeddings.
            labels: Token ids ``[batch, sequence]``; they are shifted inside.
            use_cache: Whether to return a cache; by default what the configuration says.
            logits_to_keep: How many last positions get logits; 0 for all.
            output_hidden_states, output_attentions: Return those of all layers too.
            return_dict: False for a plain tuple.
        """
        return self._chain.run(self, args, kwargs, head=True)

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as Hugging Face models do; arguments and result are theirs.

        Raises:
            ConfigurationError: Text instead of token ids, or an option that a split model cannot honour.
        """
        if inputs is not None and not isinstance(inputs, torch.Tensor):
            raise ConfigurationError(
                f"generate takes token ids [batch, sequence], a tensor, and was given a {type(inputs).__name__}",
                hint='model.generate(**tokenizer(text, return_tensors="pt")); '
                "splitlearn generate MODEL --prompt TEXT takes text",
            )
        settings = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("assistant_early_exit", getattr(settings, "assistant_early_exit", None)) is not None:
            raise ConfigurationError(
                "a split model cannot draft with its own first layers (assistant_early_exit)",
                hint="give a small model as assistant_model, or prompt_lookup_num_tokens",
            )
        self._chain.routing.refuse_others(kwargs)
        self._refuse_drafts(settings, kwargs)
        with generating():
            return super().generate(inputs, *args, **kwargs)

    def _refuse_drafts(self, settings: Any, kwargs: Mapping[str, Any]) -> None:
        """Refuse to draft tokens that a running state could not give back; transformers does so in other words."""
        drafts = {name: kwargs.get(name, getattr(settings, name, None)) for name in _DRAFTS}
        named = next((name for name, value in drafts.items() if value is not None), None)
        if named is not None and (getattr(self, "_is_stateful", False) or self._chain.own_cache is not None):
            raise ConfigurationError(
                f"a {self.config.model_type} keeps running states, which cannot give back drafted tokens ({named})",
                hint="generate without it",
            )

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        # The number of cached tokens (all but the last one's) is known here, before the first step.
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache = named_cache(dict(model_kwargs), model_kwargs.get("past_key_values"))
        for component in self.components:
            if isinstance(component, RemoteComponent):
                declare_length(component, generation_config.max_length - 1, cache)
        return result

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        split_points: Sequence[int] = (),
        **kwargs: Any,
    ) -> Any:
        """Load saved components; or a checkpoint, if ``split_points`` say how to cut it.

        Args:
            pretrained_model_name_or_path: What ``save_split`` wrote, or a checkpoint.
            split_points: ``(a, b)``, or any number of cuts, for a checkpoint.
            kwargs: Further arguments of ``load_split_model``.

        Raises:
            ConfigurationError: A checkpoint without split points, or saved components with them.
        """
        name = pretrained_model_name_or_path
        saved = holds_components(name)
        if saved == bool(split_points):
            raise ConfigurationError(
                f"{name} holds components, which are cut already"
                if saved
                else f"{name} is a model, and no cuts are given",
                hint="leave split_points out"
                if saved
                else f"SplitCausalLM.from_pretrained({str(name)!r}, "
                "split_points=(a, b)); splitlearn plan shows its layers",
            )
        if saved:
            return cls(*cast("Any", load_split_directory(name, **kwargs)))
        return cls(*cast("Any", load_split_model(None, split_points, name, **kwargs)))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict as any module does; even with ``assign``, a tied embedding and head stay one parameter."""
        if not assign:
            return super().load_state_dict(state_dict, strict)
        with keeping_ties(self):
            return super().load_state_dict(state_dict, strict, assign)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save a checkpoint of the whole model; arguments as of Hugging Face models.

        If a component runs elsewhere, the local ones are saved as components, in
        ``save_directory/components``, with an index from which a ``Trainer`` resumes.

        Raises:
            ConfigurationError: There is an adapter on the components, which such a checkpoint cannot hold.
        """
        here = [part for part in self.components if not isinstance(part, RemoteComponent)]
        # An adapter from add_adapter of transformers: save_pretrained of transformers saves it as an adapter.
        adapts = getattr(self, "_hf_peft_config_loaded", False)
        if not adapts:
            refuse_adapters(here)
        if len(here) == len(self.components) or adapts:
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
            if self.top.family.text_config and not adapts and is_main_process:
                log.warning("%s", without_others_words(save_directory))
            return
        if self.config.tie_word_embeddings and not self.all_tied_weights_keys:
            raise ConfigurationError(
                "embedding and head are tied in this model, and bottom and top have a copy each",
                hint='load both with one call: parts=("bottom", "top")',
            )
        if is_main_process:
            save_local_parts(here, save_directory)

    def train(self, mode: bool = True) -> SplitCausalLM:
        """Set training or evaluation mode, of each component too."""
        super().train(mode)
        for component in self.components:
            component.train(mode)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SplitCausalLM:
        # Through the components, because each has its own buffers, such as rotary frequencies.
        own: list[Any] = [*self.components, *cast("LinkedModules", self._modules).added()]
        for component in self.components:
            if isinstance(component, RemoteComponent) and not self._chain.mixed_dtypes:
                refuse_cast(component, fn)
        for module in own:
            module._apply(fn, recurse)  # noqa: SLF001  # nn.Module moves and casts with it
        return self

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        # Layers, which are counted over the whole model, are the components' own; the modules around them are not.
        super()._set_gradient_checkpointing(*args, **kwargs)
        names = ("gradient_checkpointing", "_gradient_checkpointing_func")
        for path, module in self.named_modules():
            states = {name: vars(module)[name] for name in names if name in vars(module)}
            for component in self.components if states and path else ():
                own = None if isinstance(component, RemoteComponent) else component.get_submodule(path)
                if hasattr(own, "gradient_checkpointing"):
                    vars(own).update(states)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Set the attention implementation of each component; arguments as of Hugging Face models."""
        for component in self._remote_first():
            component.set_attn_implementation(*args, **kwargs)

    def _remote_first(self) -> list[Any]:
        """Return the components, remote ones first: they refuse changes before any other component is changed."""
        return sorted(self.components, key=lambda part: not isinstance(part, RemoteComponent))

    def set_experts_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Set the implementation of experts in each component; arguments as of Hugging Face models."""
        for component in self._remote_first():
            component.set_experts_implementation(*args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resize the vocabulary, in bottom and top; arguments and result as of Hugging Face models."""
        resized = super().resize_token_embeddings(*args, **kwargs)
        for component in self.components:
            component.decoder_config.vocab_size = decoder_config(self.top.family, self.config).vocab_size
            component.vocab_size = component.decoder_config.vocab_size
        self._assemble(self._chain.parts, self._chain.mixed_dtypes, self._chain.crossings)
        return resized


def _in_order(owner: type[Any], named: Mapping[str, AnyComponent | None]) -> list[AnyComponent | None]:
    """Sort components that were given by name into the order of the model."""
    for name in named:
        if not is_component_name(name):
            raise TypeError(f"{owner.__name__}.__init__() got an unexpected keyword argument {name!r}")
    return [named[name] for name in sorted(named, key=place_of)]


def _with_signature_of(family_class: type[Any]) -> Callable[..., Any]:
    """Return a forward with the signature of the family's: trainers and ``generate`` inspect its parameters."""

    @functools.wraps(family_class.forward)
    def forward(self: SplitCausalLM, *args: Any, **kwargs: Any) -> Any:
        return SplitCausalLM.forward(self, *args, **kwargs)

    return forward


def _kind(part: object) -> str:
    return str(getattr(part, "component", type(part).__name__))


def _check_fit(parts: Mapping[str, Any], mixed_dtypes: bool) -> None:
    problems = [
        f"{name} is {'None: it was not loaded, or not given' if part is None else f'a {_kind(part)}'}"
        for name, part in parts.items()
        if getattr(part, "kind", None) != kind_of(name)
    ]
    if not problems:
        edges = [part.layer_range for part in parts.values()]
        if not edges[0].is_first or any(before.end != after.start for before, after in pairwise(edges)):
            problems.append(f"their layers do not follow one another: {', '.join(map(str, edges))}")
        if not edges[-1].is_last or len({edge.total for edge in edges}) > 1:
            problems.append(f"they belong to models of different depth: {', '.join(map(str, edges))}")
        facts = {
            "model_type": [part.config.model_type for part in parts.values()],
            **{
                what: [getattr(part.decoder_config, what) for part in parts.values()]
                for what in ("hidden_size", "vocab_size")
            },
        }
        # The dtype of the parameters: .to(dtype) does not change the one in the configuration.
        if not mixed_dtypes:
            facts["dtype"] = [
                part.dtype if isinstance(part, RemoteComponent) else part.weights_dtype for part in parts.values()
            ]
        for what, values in facts.items():
            if len(set(values)) > 1:
                problems.append(f"their {what} differs: {', '.join(map(str, values))}")
        # Components built from a state dict have no origin to compare.
        problems += origin_mismatches([part.origin for part in parts.values() if part.origin is not None], dtypes=False)
        problems += adapter_mismatches([part for part in parts.values() if not isinstance(part, RemoteComponent)])
    if problems:
        kinds = [getattr(part, "component", None) for part in parts.values()]
        which = "bottom, trunk and top" if len(parts) == len(THREE) else "all components"
        hint = f"load {which} of one checkpoint with the same split points"
        if kinds != list(parts) and set(kinds) == set(parts):
            hint = f"give them in this order: {', '.join(parts)}"
        raise ConfigurationError(
            f"these components do not form a model: {'; '.join(problems)}",
            hint=hint
            + ("; mixed_dtypes=True where dtypes differ on purpose" if any("dtype" in p for p in problems) else ""),
        )
