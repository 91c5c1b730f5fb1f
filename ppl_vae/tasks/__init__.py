"""Tasks: what a trained pair is used for, each with a score."""

from ppl_vae.tasks.anomaly import AnomalyDetection as AnomalyDetection
from ppl_vae.tasks.anomaly import anomaly_scores as anomaly_scores
from ppl_vae.tasks.anomaly import detect_anomalies as detect_anomalies
from ppl_vae.tasks.arithmetic import AttributeVectors as AttributeVectors
from ppl_vae.tasks.arithmetic import EditAccuracy as EditAccuracy
from ppl_vae.tasks.arithmetic import Edits as Edits
from ppl_vae.tasks.arithmetic import LatentArithmetic as LatentArithmetic
from ppl_vae.tasks.arithmetic import attribute_vectors as attribute_vectors
from ppl_vae.tasks.arithmetic import edit as edit
from ppl_vae.tasks.arithmetic import edit_accuracy as edit_accuracy
from ppl_vae.tasks.arithmetic import latent_arithmetic as latent_arithmetic
from ppl_vae.tasks.augmentation import AugmentationScore as AugmentationScore
from ppl_vae.tasks.augmentation import Augmented as Augmented
from ppl_vae.tasks.augmentation import augment as augment
from ppl_vae.tasks.augmentation import augmentation_score as augmentation_score
from ppl_vae.tasks.denoising import Denoised as Denoised
from ppl_vae.tasks.denoising import denoise as denoise
from ppl_vae.tasks.imputation import Imputation as Imputation
from ppl_vae.tasks.imputation import impute as impute

__all__ = [
    "AnomalyDetection",
    "AttributeVectors",
    "AugmentationScore",
    "Augmented",
    "Denoised",
    "EditAccuracy",
    "Edits",
    "Imputation",
    "LatentArithmetic",
    "anomaly_scores",
    "attribute_vectors",
    "augment",
    "augmentation_score",
    "denoise",
    "detect_anomalies",
    "edit",
    "edit_accuracy",
    "impute",
    "latent_arithmetic",
]
