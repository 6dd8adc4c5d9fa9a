"""Settings of the peers: the grid that was tried on the tuning windows, and what was chosen there for each data set.

The grid starts from the settings that BARS publishes for MovielensLatest_x1 (embeddings of 10, layers of 400, Adam with
1e-3) with batches and penalties for data sets of 100,000 rows. `peers/tune.py` runs it.
"""

from itertools import product

NAMES = ("lambdamart", "lightgbm", "masknet", "dcnv2", "finalmlp", "gdcn")
MLP, DROPOUT, EPOCHS = [400, 400, 400], 0.2, 2
ROUNDS = [25, 50, 100, 200, 400]


def config(model: str, dataset: str) -> dict:
    """What the driver takes, without the seed."""
    return {"model": model, **CHOSEN[dataset][model]}


def boosted(leaves: int, ids: bool, rounds: int = ROUNDS[-1], **options: object) -> dict:
    """LightGBM: leaves of a tree, whether user and item ids are among the columns, trees."""
    common = {
        "learning_rate": 0.05,
        "num_leaves": leaves,
        "min_data_in_leaf": 50,
        "feature_fraction": 0.7,
        "bagging_fraction": 0.8,
        "bagging_freq": 1,
        "cat_smooth": 20,
        "cat_l2": 20,
    }
    return {"ids": ids, "rounds": rounds, "options": {**common, **options}}


def ranked(leaves: int, ids: bool, rounds: int = ROUNDS[-1]) -> dict:
    """LambdaMART, whose gradients look at the first ten places of a request."""
    return boosted(leaves, ids, rounds, lambdarank_truncation_level=10)


def network(file: str, name: str, options: dict, penalty: float, epochs: int = EPOCHS) -> dict:
    """FuxiCTR: a class of a model's file, L2 penalty of its embeddings, epochs."""
    common = {"embedding_dim": 10, "learning_rate": 1e-3, "embedding_regularizer": penalty}
    return {
        "source": f"model_zoo/{file}/src/{file}.py",
        "class": name,
        "epochs": epochs,
        "batch": 1024,
        "options": {**common, **options},
    }


def serial(penalty: float, epochs: int = EPOCHS) -> dict:
    """MaskNet with its blocks one after the other, the better one in BARS."""
    options = {"model_type": "SerialMaskNet", "dnn_hidden_units": MLP[:2], "net_dropout": DROPOUT}
    return network("MaskNet", "MaskNet", options, penalty, epochs)


def parallel(penalty: float, epochs: int = EPOCHS) -> dict:
    """MaskNet with three blocks side by side."""
    blocks = {"model_type": "ParallelMaskNet", "parallel_num_blocks": 3, "parallel_block_dim": 100}
    options = {**blocks, "dnn_hidden_units": MLP[:2], "net_dropout": DROPOUT}
    return network("MaskNet", "MaskNet", options, penalty, epochs)


def dcnv2(penalty: float, epochs: int = EPOCHS) -> dict:
    """Three crosses beside an MLP."""
    options = {"num_cross_layers": 3, "parallel_dnn_hidden_units": MLP, "net_dropout": DROPOUT}
    return network("DCNv2", "DCNv2", {"model_structure": "parallel", **options}, penalty, epochs)


def finalmlp(penalty: float, epochs: int = EPOCHS) -> dict:
    """Two MLPs, their inputs gated by the user and by the item."""
    towers = {"mlp1_hidden_units": [400], "mlp2_hidden_units": [400, 400]}
    gates = {"use_fs": True, "fs_hidden_units": [64], "fs1_context": ["user_id"], "fs2_context": ["item_id"]}
    dropout = {"mlp1_dropout": DROPOUT, "mlp2_dropout": DROPOUT}
    return network("FinalMLP", "FinalMLP", {**towers, **gates, **dropout, "num_heads": 10}, penalty, epochs)


def gdcn(penalty: float, epochs: int = EPOCHS) -> dict:
    """Three gated crosses beside an MLP (GDCN-P)."""
    options = {"num_cross_layers": 3, "dnn_hidden_units": MLP, "net_dropout": DROPOUT}
    return network("GDCN", "GDCNP", options, penalty, epochs)


# One run tells of every number of epochs or trees up to its own: it is measured at each stage of `trace`.
_PENALTIES = (1e-4, 1e-3, 1e-2)
_LEAVES_IDS = tuple(product((7, 15, 31), (False, True)))
GRID: dict[str, list[dict]] = {
    "lambdamart": [{**ranked(leaves, ids), "trace": ROUNDS} for leaves, ids in _LEAVES_IDS],
    "lightgbm": [{**boosted(leaves, ids), "trace": ROUNDS} for leaves, ids in _LEAVES_IDS],
    "masknet": [{**make(penalty), "trace": True} for make, penalty in product((serial, parallel), _PENALTIES)],
    "dcnv2": [{**dcnv2(penalty), "trace": True} for penalty in _PENALTIES],
    "finalmlp": [{**finalmlp(penalty), "trace": True} for penalty in _PENALTIES],
    "gdcn": [{**gdcn(penalty), "trace": True} for penalty in _PENALTIES],
}

# The best HIT@3 + AUC on the tuning window, seed 0:
# MovieLens, the whole grid: LambdaMART .947/.688, LightGBM .956/.720; MaskNet .970/.733 (serial .949/.709), DCNv2
# .915/.726, FinalMLP .947/.728, GDCN .972/.726.
# KuaiRand: LambdaMART .992/.667 and LightGBM 1.004/.725 of the whole grid; of the networks, one or two epochs with the
# penalty that was best on MovieLens: DCNv2 .978/.715, FinalMLP .999/.724, MaskNet .999/.723, GDCN .989/.717.
CHOSEN: dict[str, dict[str, dict]] = {
    "movielens": {
        "lambdamart": ranked(15, ids=True, rounds=400),
        "lightgbm": boosted(15, ids=True, rounds=100),
        "masknet": parallel(1e-2, epochs=1),
        "dcnv2": dcnv2(1e-4, epochs=1),
        "finalmlp": finalmlp(1e-3, epochs=2),
        "gdcn": gdcn(1e-4, epochs=2),
    },
    "kuairand": {
        "lambdamart": ranked(15, ids=False, rounds=50),
        "lightgbm": boosted(15, ids=False, rounds=100),
        "masknet": parallel(1e-2, epochs=1),
        "dcnv2": dcnv2(1e-4, epochs=1),
        "finalmlp": finalmlp(1e-3, epochs=2),
        "gdcn": gdcn(1e-4, epochs=1),
    },
}
