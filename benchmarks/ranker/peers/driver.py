"""Trains one peer and scores the evaluation window. Runs in the peers' environment, without our packages.

    python driver.py DATA_DIRECTORY OUT.npz '{"model": "lambdamart", "seed": 0, ...}'

FuxiCTR's own model classes, losses, optimisers and training steps are used; only its data loader (which starts Ray) is
replaced by slices of arrays in memory.
"""

import importlib.util
import json
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np

LIMIT = 10.0  # standard deviations


def main(data: Path, out: Path, config: dict) -> None:
    meta = json.loads((data / "meta.json").read_text())
    parts = [dict(np.load(data / f"{name}.npz")) for name in ("train", "evaluation")]
    run = lightgbm_scores if config["model"] in ("lambdamart", "lightgbm") else fuxictr_scores
    np.savez(out, **run(meta, *parts, config))


# LightGBM -------------------------------------------------------------------------------------------------------------


def lightgbm_scores(meta: dict, train: dict, evaluation: dict, config: dict) -> dict:
    import lightgbm

    columns = [flat(meta, part, config["ids"]) for part in (train, evaluation)]
    options = {
        "objective": "lambdarank" if config["model"] == "lambdamart" else "binary",
        "seed": config["seed"],
        "num_threads": 1,
        "verbosity": -1,
        "deterministic": True,
        **config["options"],
    }
    start = time.process_time()
    group = np.bincount(train["request"]) if options["objective"] == "lambdarank" else None
    x, categorical = columns[0]
    dataset = lightgbm.Dataset(x, train["label"], group=group, categorical_feature=categorical)
    booster = lightgbm.train(options, dataset, num_boost_round=config["rounds"])
    seconds = time.process_time() - start
    steps = config.get("trace") or [config["rounds"]]
    scores = [booster.predict(columns[1][0], num_iteration=n, num_threads=1) for n in steps]
    return {"scores": np.stack(scores), "seconds": seconds}


def flat(meta: dict, part: dict, ids: bool) -> tuple[np.ndarray, list[int]]:
    """(N, columns) with integer codes and one 0/1 column for each value of a multi-valued feature.

    `ids` tells whether user and item ids are among the columns.
    """
    wanted = [i for i, name in enumerate(meta["cat"]) if ids or name not in ("user_id", "item_id")]
    blocks = [part["cat"][:, wanted].astype(np.float32), part["num"]]
    for name, size in meta["slots"].items():
        slots = part[f"slots_{name}"]
        hot = np.zeros((len(slots), size), np.float32)
        np.put_along_axis(hot, slots.astype(np.int64), 1, axis=1)
        blocks.append(hot[:, 1:])
    return np.concatenate(blocks, 1), list(range(len(wanted)))


# FuxiCTR --------------------------------------------------------------------------------------------------------------


def fuxictr_scores(meta: dict, train: dict, evaluation: dict, config: dict) -> dict:
    import torch
    from fuxictr.pytorch.torch_utils import seed_everything

    torch.set_num_threads(1)
    seed_everything(config["seed"])
    scale = Scale(train["num"])
    features = feature_map(meta, scale, config["options"].get("embedding_dim", 10))
    model = model_class(config)(
        features,
        gpu=-1,
        optimizer="adam",
        loss="binary_crossentropy",
        metrics=["AUC"],
        verbose=0,
        model_root=".",
        **config["options"],
    )
    model._max_gradient_norm = 10.0  # what its fit() sets
    batches = Batches(meta, scale, train), Batches(meta, scale, evaluation)
    rng, size, scores = np.random.default_rng(config["seed"]), config["batch"], []
    seconds = 0.0
    for epoch in range(config["epochs"]):
        start = time.process_time()
        model.train()
        order = rng.permutation(len(train["label"]))
        for rows in (order[i : i + size] for i in range(0, len(order), size)):
            model.train_step(batches[0](rows))
        seconds += time.process_time() - start
        if config.get("trace") or epoch + 1 == config["epochs"]:
            scores.append(predict(model, batches[1]))
    return {"scores": np.stack(scores), "seconds": seconds}


def predict(model, batches: "Batches") -> np.ndarray:
    import torch

    model.eval()
    with torch.no_grad():
        chunks = np.array_split(np.arange(batches.rows), -(-batches.rows // 4096))
        return np.concatenate([model(batches(rows))["y_pred"].numpy().ravel() for rows in chunks])


def model_class(config: dict) -> type:
    """A class of a model's file in FuxiCTR's model_zoo."""
    path = Path(config["source"])
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return getattr(module, config["class"])


class Scale:
    """Standardises numeric columns by the training window and keeps where values are missing."""

    def __init__(self, num: np.ndarray) -> None:
        self.mean, self.std = np.nan_to_num(np.nanmean(num, 0)), np.nanstd(num, 0)
        self.std = np.where(self.std > 0, self.std, 1)
        missing = np.isnan(num)
        # Many columns are missing together (all rates of one entity): one indicator is enough for them.
        _, first = np.unique(missing, axis=1, return_index=True)
        self.indicators = [i for i in sorted(first) if 0 < missing[:, i].mean() < 1]

    def __call__(self, num: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scaled = np.clip((num - self.mean) / self.std, -LIMIT, LIMIT)
        return np.nan_to_num(scaled).astype(np.float32), np.isnan(num[:, self.indicators]).astype(np.float32)


def feature_map(meta: dict, scale: Scale, dim: int):
    """Every column as a field of FuxiCTR, which gives each one embedding of `dim` numbers."""
    from fuxictr.features import FeatureMap

    pool = "layers.MaskedAveragePooling()"
    shared = {"type": "sequence", "vocab_size": meta["cat"]["item_id"], "feature_encoder": pool, "padding_idx": 0}
    features = FeatureMap("table", ".")
    features.labels, features.default_emb_dim = ["label"], dim
    features.features = OrderedDict(
        {name: {"type": "categorical", "vocab_size": n, "padding_idx": 0} for name, n in meta["cat"].items()}
        | {
            name: {"type": "sequence", "vocab_size": n, "feature_encoder": pool, "padding_idx": 0}
            for name, n in meta["slots"].items()
        }
        | {f"seq_{name}": {**shared, "share_embedding": "item_id"} for name in meta["seq"]}
        | {f"num_{i}": {"type": "numeric"} for i in range(len(scale.mean))}
        | {f"missing_{i}": {"type": "numeric"} for i in range(len(scale.indicators))}
    )
    for spec in features.features.values():
        spec["source"] = ""
    features.num_fields = features.get_num_fields()
    return features


class Batches:
    """Rows of a part as the dictionary of tensors that FuxiCTR's models take."""

    def __init__(self, meta: dict, scale: Scale, part: dict) -> None:
        self.meta, self.part, self.rows = meta, part, len(part["label"])
        self.num, self.missing = scale(part["num"])

    def __call__(self, rows: np.ndarray) -> dict:
        import torch

        request = self.part["request"][rows]
        cat, num, missing = self.part["cat"][rows], self.num[rows], self.missing[rows]
        batch = {name: cat[:, i] for i, name in enumerate(self.meta["cat"])}
        batch |= {name: self.part[f"slots_{name}"][rows] for name in self.meta["slots"]}
        for name in self.meta["seq"]:
            seq = self.part[f"seq_{name}"][request]
            batch[f"seq_{name}"] = seq[:, : max(1, int((seq > 0).sum(1).max()))]  # newest first: padding is at the end
        batch |= {f"num_{i}": num[:, i] for i in range(num.shape[1])}
        batch |= {f"missing_{i}": missing[:, i] for i in range(missing.shape[1])}
        batch["label"] = self.part["label"][rows].astype(np.float32)
        return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in batch.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
