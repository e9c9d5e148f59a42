"""A request on its way to a replica."""

from __future__ import annotations

from dataclasses import dataclass, field

from ulysses_infer.server.messages import Submit


@dataclass(eq=False)
class RoutedRequest:
    """A request with what its routing needs. The request router runs in the ingress's process and shares the object
    with the ingress; the replica gets a copy."""

    submit: Submit
    num_sequences: int
    tried: list[str] = field(default_factory=list)
    """Replicas that it was sent to, by their unique ids, in order."""
    has_output: bool = False
    """Whether tokens of it have arrived."""
    is_done: bool = False
    """Whether it needs no replica any more."""

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens without output yet."""
        return 0 if self.has_output else len(self.submit.token_ids)
