"""Co-occurrence of important channels and their spectral clustering (docs/method.md, section 4.3)."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.linalg import eigh
from sklearn.cluster import KMeans


def occurrence_matrix(importance: np.ndarray, channels: np.ndarray, in_features: int) -> sparse.csr_matrix:
    """`O` `[tokens, len(channels)]`, 1 where a channel is among a token's important ones.

    Example:
        >>> importance = np.array([[0, 2], [2, -1], [3, 0]])  # the important channels of three tokens
        >>> occurrence_matrix(importance, channels=np.array([2, 0]), in_features=4).toarray()
        array([[1., 1.],
               [1., 0.],
               [0., 1.]])
    """
    position = np.full(in_features + 1, -1)
    position[channels] = np.arange(len(channels))
    columns = position[importance]  # -1 entries of the lists read the last slot, which is -1 as well
    rows, slots = np.nonzero(columns >= 0)
    values = np.ones(len(rows), np.float64)
    return sparse.csr_matrix((values, (rows, columns[rows, slots])), shape=(len(importance), len(channels)))


def npmi(occurrence: sparse.csr_matrix) -> np.ndarray:
    """Normalised pointwise mutual information `[n, n]` in [-1, 1] of the columns of a 0/1 matrix.

    Example:
        >>> from scipy import sparse
        >>> together = sparse.csr_matrix([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
        >>> npmi(together).round(2) + 0.0
        array([[ 1.,  1., -1.],
               [ 1.,  1., -1.],
               [-1., -1.,  1.]])
    """
    joint = (occurrence.T @ occurrence).toarray() / occurrence.shape[0]
    single = np.diag(joint)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_joint = np.log(joint)
        score = (log_joint - np.log(single)[:, None] - np.log(single)[None, :]) / -log_joint
    score[joint == 0] = -1.0
    score[joint == 1] = 1.0
    limited: np.ndarray = np.clip(score, -1.0, 1.0)
    return limited


def spectral_clusters(similarity: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Cluster label `[n]` of every channel.

    Negative similarities ("never together") count as no edge, because the normalised Laplacian needs non-negative
    affinities.

    Example:
        >>> pairs = np.array([[0.0, 0.9, 0.0, 0.0], [0.9, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.8], [0.0, 0.0, 0.8, 0.0]])
        >>> labels = spectral_clusters(pairs, clusters=2, seed=0)
        >>> bool(labels[0] == labels[1] != labels[2] == labels[3])
        True
    """
    if clusters <= 1 or len(similarity) <= clusters:
        return np.arange(len(similarity)) % max(clusters, 1)
    affinity = np.maximum(similarity, 0.0)
    np.fill_diagonal(affinity, 0.0)
    degree = affinity.sum(1)
    scale = 1.0 / np.sqrt(np.maximum(degree, 1e-8))
    laplacian = np.eye(len(affinity)) - scale[:, None] * affinity * scale[None, :]
    vectors = eigh(laplacian, subset_by_index=[0, clusters - 1])[1]
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = np.where(norms > 1e-12, vectors / np.maximum(norms, 1e-12), 1.0 / np.sqrt(clusters))
    labels: np.ndarray = KMeans(n_clusters=clusters, n_init=10, random_state=seed).fit_predict(rows)
    return labels
