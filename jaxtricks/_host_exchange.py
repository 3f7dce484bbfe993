"""Exchange short texts between the processes of `jax.distributed`."""

from jaxtricks import _compat


class Meeting:
    """Short texts that all processes of `jax.distributed` exchange on the host, in an order they share.

    No collective of the devices: a thread that loads data may meet while a step runs.
    The store that jax.distributed keeps for itself has no public name.
    """

    def __init__(self, purpose: str):
        state = _compat.distributed_state()
        self._client, self._id, self._size = (
            state.client,
            state.process_id,
            state.num_processes,
        )
        self._count = 0
        if self._client is not None:
            # All processes make their meetings in the same order.
            number = self._client.key_value_increment(
                f"jaxtricks/{purpose}/{self._id}", 1
            )
            self._name = f"jaxtricks/{purpose}/{number}"

    def exchange(self, text: str, timeout: float) -> list[str]:
        """Return the texts of all processes; wait at most `timeout` seconds, then raise."""
        if self._client is None or self._size == 1:
            return [text]
        self._count += 1
        name = f"{self._name}/{self._count}"
        self._client.key_value_set(f"{name}/{self._id}", text)
        return [
            self._client.blocking_key_value_get(
                f"{name}/{i}", int(timeout * 1000)
            )
            for i in range(self._size)
        ]
