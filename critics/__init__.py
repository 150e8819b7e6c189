"""Critics: who says how good a sample is. They know tensors only, and nothing of diffusion.

A critic is a function `f(sample (N, *shape)) -> (N,)`, high on data and low on fakes: the reward
of the environments. `MMDCritic` is ready at once; `IPMCritic` learns, with networks from
`make_critic` and `make_baseline`. `metrics` holds the distances between sets of samples that a run
reports; those of images are taken in the space of a feature extractor. `evaluate` takes them all.
"""

from . import metrics
from .ipm import IPMCritic
from .joint import JointMMDCritic
from .metrics.classifier import ClassifierFeatures, train_classifier
from .metrics.efficientnet import EfficientNetLite0
from .metrics.evaluation import Evaluation
from .metrics.features import Cifar10ResNet, FeatureExtractor, InceptionFeatures
from .metrics.fidelity import FeatureDistances
from .metrics.report import Report, evaluate
from .mmd import MMDCritic
from .networks import ConvCritic, MLPBaseline, MLPCritic, make_baseline, make_critic
from .reward import RewardCritic

__all__ = [
    "Cifar10ResNet",
    "ClassifierFeatures",
    "ConvCritic",
    "EfficientNetLite0",
    "Evaluation",
    "FeatureDistances",
    "FeatureExtractor",
    "IPMCritic",
    "InceptionFeatures",
    "JointMMDCritic",
    "MLPBaseline",
    "MLPCritic",
    "MMDCritic",
    "Report",
    "RewardCritic",
    "evaluate",
    "make_baseline",
    "make_critic",
    "metrics",
    "train_classifier",
]
