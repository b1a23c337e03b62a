"""The nearest product of two thin matrices, in float64 on the host (Eckart and Young, 1936).

    truncate(a, b, rank)     to a product a @ b, which is never built
    nearest(matrix, rank)    to a matrix

Both return the new factors, the distance (the Frobenius norm of the dropped singular values) and
the norm of the input.
"""

import numpy as np

Factors = tuple[np.ndarray, np.ndarray, float, float]  # (in, rank), (rank, out), distance, norm


def truncate(a: np.ndarray, b: np.ndarray, rank: int) -> Factors:
    """The nearest product of that rank to a (in, k) @ b (k, out).

    With a = Qa Ra and b^T = Qb Rb the product is Qa (Ra Rb^T) Qb^T, and the singular values are
    those of the small matrix in the middle. Each factor takes their square roots.
    """
    q_a, r_a = np.linalg.qr(a)
    q_b, r_b = np.linalg.qr(b.T)
    left, values, right = np.linalg.svd(r_a @ r_b.T, full_matrices=False)
    root = np.sqrt(values[:rank])
    lost, size = (float(np.linalg.norm(part)) for part in (values[rank:], values))
    return q_a @ left[:, :rank] * root, root[:, None] * (right[:rank] @ q_b.T), lost, size


def nearest(matrix: np.ndarray, rank: int) -> Factors:
    """The nearest product of that rank to a matrix (in, out).

    The singular vectors of the shorter side are eigenvectors of a Gram matrix, which is many times
    cheaper than an SVD. Its eigenvalues are squares, which float64 has the precision for.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    vectors = np.linalg.eigh(tall.T @ tall)[1][:, : -rank - 1 : -1]
    scaled = tall @ vectors
    root = np.sqrt(np.linalg.norm(scaled, axis=0))
    lost, size = (float(np.linalg.norm(x)) for x in (tall - scaled @ vectors.T, tall))
    long = np.divide(scaled, root, out=np.zeros_like(scaled), where=root > 0)
    short = root[:, None] * vectors.T
    return (short.T, long.T, lost, size) if wide else (long, short, lost, size)
