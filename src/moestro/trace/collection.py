"""The collection of past requests' activation matrices (EAMC), and finding those most like a request under way.

From MoE-Infinity (arXiv 2401.14361, section 4): a fixed number of entries; when it is full, a new one takes the place
of the entry most like it, which keeps what is recent and what is rare.

Shapes: n entries, L MoE layers, E experts per layer, M entries asked for.
"""

from __future__ import annotations

import secrets

import numpy as np

from moestro.trace.eam import directions_of

_DEFAULT_BYTES = 64 << 20
_DEFAULT_ENTRIES = (128, 1024)
_FIRST_ENTRIES = 16
MOST_COUNT = 1 << 24
"""Counts stay below: float32 is exact up to here."""


def default_capacity(layers: int, experts: int) -> int:
    """As many entries as 64 MiB hold, but 128 to 1024.

    The published latency is flat from about 120 entries on; the bytes bind models with tens of thousands of experts.
    """
    least, most = _DEFAULT_ENTRIES
    return min(max(_DEFAULT_BYTES // (8 * layers * experts), least), most)


class EamCollection:
    """Matrices of past requests, of one phase.

    Each entry has an id, by which files are merged and by which the other phase of the same request is found. `version`
    rises with every change.
    """

    def __init__(self, layers: int, experts: int, *, capacity: int | None = None) -> None:
        self.layers, self.experts = layers, experts
        self.capacity = default_capacity(layers, experts) if capacity is None else capacity
        assert self.capacity > 0
        self.version = 0
        self._used = 0
        self._ids_n: np.ndarray = np.zeros(0, dtype=np.int64)
        self._changed_n = np.zeros(0, dtype=np.int64)
        self._tokens_n = np.zeros(0, dtype=np.float32)
        self._counts_nLE: np.ndarray = np.zeros((0, layers, experts), dtype=np.float32)
        # Entries side by side: a token's K experts then cost K reads of n neighbouring numbers.
        self._directions_LEn: np.ndarray = np.zeros((layers, experts, 0), dtype=np.float32)
        self._known_Ln = np.zeros((layers, 0), dtype=np.float32)

    def __len__(self) -> int:
        return self._used

    @property
    def nbytes(self) -> int:
        """Memory that the entries take."""
        return int(self._counts_nLE.nbytes + self._directions_LEn.nbytes)

    @property
    def ids_n(self) -> np.ndarray:
        """The entries' ids, int64."""
        return self._ids_n[: self._used]

    def counts(self, index: int) -> np.ndarray:
        """Counts [L, E] of an entry, float32. Do not write to it."""
        assert 0 <= index < self._used, index
        counts_LE: np.ndarray = self._counts_nLE[index]
        return counts_LE

    def all_counts(self) -> np.ndarray:
        """Counts [n, L, E] of all entries, float32. Do not write to it."""
        return self._counts_nLE[: self._used]

    def insert(self, counts_LE: np.ndarray, *, id: int | None = None) -> int:
        """Add a request's matrix, in the place of the entry most like it when there is no other. Returns its index.

        `id` is the one that the request has in the other phase's collection, or in a file (None: a new one).
        """
        assert counts_LE.shape == (self.layers, self.experts), counts_LE.shape
        assert counts_LE.any(), "nothing is known of this request"
        assert counts_LE.min() >= 0
        assert counts_LE.max() < MOST_COUNT
        if self._used < self.capacity:
            index = self._used
            self._grow(index + 1)
            self._used += 1
        else:
            index = int(self.similarities(counts_LE).argmax())
        self.version += 1
        self._ids_n[index] = new_id() if id is None else id
        self._changed_n[index] = self.version
        self._tokens_n[index] = counts_LE.sum(axis=1).max()
        self._counts_nLE[index] = counts_LE
        self._directions_LEn[:, :, index] = directions_of(counts_LE)
        self._known_Ln[:, index] = counts_LE.any(axis=1)
        return index

    def similarities(self, counts_LE: np.ndarray) -> np.ndarray:
        """How like each entry is to a matrix: `similarity` [n], float32. Reads everything; see `Matcher`."""
        cosines_Ln = np.matmul(directions_of(counts_LE)[:, None, :], self._directions_LEn[:, :, : self._used])[:, 0]
        layers_n = counts_LE.any(axis=1).astype(np.float32) @ self._known_Ln[:, : self._used]
        mean_n: np.ndarray = cosines_Ln.sum(axis=0) / np.maximum(layers_n, 1)
        return mean_n

    def probabilities(
        self, indices_M: np.ndarray, weights_M: np.ndarray | None = None, *, layers: slice = slice(None)
    ) -> np.ndarray:
        """The weighted sum of some entries, each row normalised: [L, E], or of the layers of the slice alone.

        Entries count alike (or by weight) however long they are. A row [E] adds up to 1: it is the share of a token's
        picks that falls on each expert. A row of zeros means that none of these entries knows the layer.
        """
        scale_M = 1 / self._tokens_n[indices_M]
        if weights_M is not None:
            scale_M = scale_M * weights_M.astype(np.float32)
        counts_MLE = self._counts_nLE[:, layers][indices_M]
        sum_shape = counts_MLE.shape[1:]
        flat_MP = counts_MLE.reshape(len(indices_M), sum_shape[0] * sum_shape[1])
        sum_LE: np.ndarray = (scale_M @ flat_MP).reshape(sum_shape)
        totals_L1 = sum_LE.sum(axis=1, keepdims=True)
        totals_L1[totals_L1 == 0] = 1
        sum_LE /= totals_L1
        return sum_LE

    def overall(self) -> np.ndarray:
        """Shares [L, E] over all entries, each counting alike; zeros where nothing is known."""
        return self.probabilities(np.arange(self._used))

    def _grow(self, needed: int) -> None:
        have = len(self._ids_n)
        if needed <= have:
            return
        more = min(max(2 * have, _FIRST_ENTRIES), self.capacity) - have
        self._ids_n = np.pad(self._ids_n, (0, more))
        self._changed_n = np.pad(self._changed_n, (0, more))
        self._tokens_n = np.pad(self._tokens_n, (0, more))
        self._counts_nLE = np.pad(self._counts_nLE, ((0, more), (0, 0), (0, 0)))
        self._directions_LEn = np.pad(self._directions_LEn, ((0, 0), (0, 0), (0, more)))
        self._known_Ln = np.pad(self._known_Ln, ((0, 0), (0, more)))


class Collections:
    """Those of a model, by phase of requests. `capacity` is of each (None: by the size of the model)."""

    def __init__(self, layers: int, experts: int, *, capacity: int | None = None) -> None:
        self.prefill = EamCollection(layers, experts, capacity=capacity)
        self.decode = EamCollection(layers, experts, capacity=capacity)

    @property
    def phases(self) -> dict[str, EamCollection]:
        """The collections by the name of their phase."""
        return {"prefill": self.prefill, "decode": self.decode}


class Matcher:
    """Finds the entries most like a request under way, layer by layer as its tokens are routed.

    The products with every entry are kept up to date: a layer's new counts cost one addition of n numbers for each
    expert that was picked, whatever went before. A collection that changes meanwhile is followed.
    """

    def __init__(self, collection: EamCollection) -> None:
        self._collection = collection
        self._counts_LE = np.zeros((collection.layers, collection.experts), dtype=np.float32)
        self._inverse_L = np.zeros(collection.layers, dtype=np.float32)
        self._version = 0
        self._products_Ln = np.zeros((collection.layers, 0), dtype=np.float32)
        self._sum_n = np.zeros(0)
        self._layers_n = np.zeros(0, dtype=np.float32)

    def observe(self, layer: int, counts_E: np.ndarray) -> None:
        """Add rows of the request: `counts_E` of them went to each expert of the layer."""
        self.follow()
        used_U = counts_E.nonzero()[0]
        if not len(used_U):
            return
        added_U = counts_E[used_U].astype(np.float32)
        row_E = self._counts_LE[layer]
        row_E[used_U] += added_U
        products_n = self._products_Ln[layer]
        before = self._inverse_L[layer]
        if before:
            self._sum_n -= products_n * before
        else:
            self._layers_n += self._collection._known_Ln[layer]
        products_n += added_U @ self._collection._directions_LEn[layer].take(used_U, axis=0)
        inverse = np.float32(1 / np.sqrt(row_E @ row_E))
        self._inverse_L[layer] = inverse
        self._sum_n += products_n * inverse

    def nearest(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The indices and similarities of up to `count` entries, the most like first.

        Only layers that have been observed, and that the entry knows, are compared; an entry without any is left out.
        """
        self.follow()
        similarity_n = self._similarity_n()
        if count == 1:
            best_M = similarity_n.argmax(axis=0, keepdims=True) if len(similarity_n) else np.zeros(0, dtype=np.int64)
        elif count < len(similarity_n):
            best_M = similarity_n.argpartition(-count)[-count:]
            best_M = best_M[(-similarity_n[best_M]).argsort(kind="stable")]
        else:
            best_M = (-similarity_n).argsort(kind="stable")
        found_M = similarity_n[best_M]
        if len(found_M) and found_M[-1] < 0:
            best_M, found_M = best_M[found_M >= 0], found_M[found_M >= 0]
        return best_M, found_M

    def clear(self) -> None:
        """Forget what has been observed: for matching by one forward pass instead of by the request so far."""
        for array in (self._counts_LE, self._inverse_L, self._products_Ln, self._sum_n, self._layers_n):
            array[:] = 0

    def follow(self) -> None:
        """Take in what has changed in the collection since the last call."""
        collection = self._collection
        if self._version == collection.version:
            return
        capacity = len(collection._ids_n)
        if capacity != len(self._sum_n):
            self._resize(capacity)
        changed_C = np.flatnonzero(collection._changed_n > self._version)
        self._version = collection.version
        seen_L = self._inverse_L.astype(bool)
        if not seen_L.any():
            return
        directions_LEC = collection._directions_LEn[:, :, changed_C]
        self._products_Ln[:, changed_C] = np.matmul(self._counts_LE[:, None, :], directions_LEC)[:, 0]
        cosines_LC = self._products_Ln[:, changed_C] * self._inverse_L[:, None]
        self._sum_n[changed_C] = cosines_LC.sum(axis=0, dtype=np.float64)
        self._layers_n[changed_C] = collection._known_Ln[:, changed_C][seen_L].sum(axis=0)

    def _similarity_n(self) -> np.ndarray:
        """Of each entry; negative where there is nothing to compare."""
        used = len(self._collection)
        layers_n = self._layers_n[:used]
        return np.where(layers_n > 0, self._sum_n[:used] / np.maximum(layers_n, 1), -1)

    def _resize(self, size: int) -> None:
        """Room for so many entries; `follow` fills in those that are new."""
        more = size - len(self._sum_n)
        self._products_Ln = np.pad(self._products_Ln, ((0, 0), (0, more)))
        self._sum_n = np.pad(self._sum_n, (0, more))
        self._layers_n = np.pad(self._layers_n, (0, more))


def new_id() -> int:
    """An id that no other entry has, in any process."""
    return secrets.randbits(63)
