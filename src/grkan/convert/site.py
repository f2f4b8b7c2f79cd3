"""A place in a model where a rational function can take the place of an activation."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from .activation import Activation
from .calls import CallRecipe


@dataclass
class Site:
    """An activation that can become rational, and the linear layers around it."""

    name: str
    layout: str
    """One of `convert.recipe.LAYOUTS`."""
    parts: dict[str, str | None]
    """Full names of the parts in the model, keyed by the part names of `GRKAN`; `act` is the activation."""
    parent: nn.Module
    slot: str
    """The attribute of `parent` that holds the activation."""
    activation: Activation
    first: nn.Module | None
    second: nn.Module | None
    width: int
    """The number of channels of the activation."""
    channel_dim: int = -1
    shared: bool = False
    """Whether the channels are unknown, so that one function serves all of them. `width` is then 1."""
    call: CallRecipe | None = None
    """The call in `forward`, if the activation is a function."""
    doubt: str = ""
    """Why this may not belong to a feed-forward part. Ignored if linear layers turn out to be next to it."""
    norms: list[nn.Module] = field(default_factory=list)
    """The norms that may come before the first linear layer."""

    @property
    def modules(self) -> list[str]:
        """The names of the parts that exist."""
        return [name for name in self.parts.values() if name is not None]

    def keep_linear(self) -> None:
        """Leave the first linear layer unchanged, because the MLP around the activation is not known well enough."""
        self.layout, self.parts = "activation", {"act": self.parts["act"]}

    def share(self) -> None:
        """Use one function for all channels."""
        self.keep_linear()
        self.shared, self.width, self.channel_dim = True, 1, -1

    def place(self, channels: tuple[int, int] | None, shapes: Sequence[tuple[int, ...]]) -> None:
        """Correct the site after a run: `channels` are (dimension, number) or None, `shapes` those of the inputs."""
        other = [s for s in shapes if s and (len(s) <= self.channel_dim or s[self.channel_dim] != self.width)]
        if self.layout == "activation" or other:
            self.keep_linear()
            if channels is None:
                self.share()
            else:
                self.shared, (self.channel_dim, self.width) = False, channels


class NotFoundError(Exception):
    """The reason why an activation is not converted."""
