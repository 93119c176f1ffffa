"""The public names; __init__.py looks them up here."""

from .config import CFG as CFG
from .data.captions import make_train_valid_dfs as make_train_valid_dfs
from .data.captions import read_captions as read_captions
from .data.loaders import build_loaders as build_loaders
from .errors import UserError as UserError
from .evaluation.comparison import compare as compare
from .evaluation.retrieval import recall_at_k as recall_at_k
from .evaluation.zero_shot import classify as classify
from .models.clip import CLIPModel as CLIPModel
from .models.clip import ProjectionHead as ProjectionHead
from .models.encoders import ImageEncoder as ImageEncoder
from .models.encoders import TextEncoder as TextEncoder
from .models.saved import load as load
from .presets import PRESETS as PRESETS
from .retrieval.embed import encode_image as encode_image
from .retrieval.embed import encode_text as encode_text
from .retrieval.embed import get_image_embeddings as get_image_embeddings
from .retrieval.explain import explain as explain
from .retrieval.index import Index as Index
from .retrieval.matches import find_captions as find_captions
from .retrieval.matches import find_matches as find_matches
from .training.engine import train_epoch as train_epoch
from .training.engine import valid_epoch as valid_epoch
from .training.losses import contrastive_loss as contrastive_loss
