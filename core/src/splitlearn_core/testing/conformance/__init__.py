"""The checks that every family must pass, as one pytest class.

A plugin's whole test file is::

    from splitlearn_core.testing import FamilyConformance

    class TestLlama(FamilyConformance):
        model_type = "llama"

Everything is compared with the unsplit Hugging Face model by ``torch.equal``: same machine, same
dtype, same batch, so there is no tolerance to choose. A check that fails names the field of the
family to look at. ``splitlearn plugins test llama`` runs the same checks with no test file at all.
"""

from __future__ import annotations

from splitlearn_core.testing.conformance.description import Description
from splitlearn_core.testing.conformance.discovery import Discovery
from splitlearn_core.testing.conformance.generation import Generation
from splitlearn_core.testing.conformance.guarding import Guarding
from splitlearn_core.testing.conformance.keys import Keys
from splitlearn_core.testing.conformance.likeness import Likeness
from splitlearn_core.testing.conformance.managing import Managing
from splitlearn_core.testing.conformance.parity import Parity
from splitlearn_core.testing.conformance.planning import Planning
from splitlearn_core.testing.conformance.storage import Storage
from splitlearn_core.testing.conformance.training import Training

__all__ = ["FamilyConformance"]


# pytest runs the checks of the last base first.
class FamilyConformance(
    Managing, Storage, Training, Likeness, Generation, Parity, Planning, Keys, Description, Discovery, Guarding
):
    """Subclass it, name the model type, and every method is a test.

    Optional attributes are ``config`` (values that a tiny model of this type needs, or a whole
    ``config.json``), ``variants`` (in addition to tied and untied), ``legacy_tensors``,
    ``expected_failures``, ``attention``, ``dtypes`` and ``distribution``.

    ::

        class TestLlama(FamilyConformance):
            model_type = "llama"
            variants = {"biased": {"attention_bias": True}}
            legacy_tensors = {"layers.0.self_attn.rotary_emb.inv_freq": (4,)}
    """
