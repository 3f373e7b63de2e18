"""
Codec "wan": Wan2.1's own autoencoder and text encoder, through diffusers and transformers.

    pip install -r requirements-wan.txt
    python data.py --world folder --videos DIR --pose_scale 1 --wan Wan2.1-T2V-1.3B-Diffusers ...

The first latent is one picture, every further one is four: latent i shows picture 4 i last, and the pose of
that picture is its pose.
"""
import functools
import html
import json

import torch
from torch.nn import functional

from camera import BadInput


def open_codec(folder, device):
    """The codec in this folder: Wan2.1's or HunyuanVideo-1.5's."""
    try:
        with open(f'{folder}/vae/config.json') as f:
            kind = json.load(f).get('_class_name')
    except (OSError, ValueError, AttributeError):
        raise BadInput(f'--wan {folder}: no vae/config.json there: '
                       'name a folder such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers') from None
    if kind == 'AutoencoderKLHunyuanVideo15':
        from worlds.hunyuan import Hunyuan
        return Hunyuan(folder, device)
    return Wan(folder, device)


@torch.no_grad()
def encode_clips(vae, frames, device):
    """Pictures (B, 4 F - 3, H, W, 3), uint8 or float in [0, 1] -> the autoencoder's latents (B, F, C, h, w),
    one clip at a time."""
    x = frames.float() / 255 if frames.dtype == torch.uint8 else frames
    latents = []
    for clip in x:
        clip = clip.to(device).movedim(-1, 0)[None] * 2 - 1           # (1, 3, 4 F - 3, H, W) in [-1, 1]
        latents.append(vae.encode(clip).latent_dist.mode())           # (1, C, F, h, w)
    return torch.cat(latents).movedim(2, 1)


class Wan:
    """The interface of Dct in data.py. The autoencoder computes in float32, the text encoder in bfloat16."""
    stride = 4                                                # pictures in a latent
    across = 8                                                # pixels in a latent's cell

    def __init__(self, folder, device='cpu'):
        try:
            from diffusers import AutoencoderKLWan
        except ImportError:
            raise BadInput('Wan\'s autoencoder needs packages: pip install -r requirements-wan.txt') from None
        self.folder = folder
        self.device = device
        vae = AutoencoderKLWan.from_pretrained(f'{folder}/vae', low_cpu_mem_usage=False)
        self.vae = vae.float().to(device).eval().requires_grad_(False)
        self.mean = torch.tensor(vae.config.latents_mean, device=device).view(-1, 1, 1, 1)    # (16, 1, 1, 1)
        self.std = torch.tensor(vae.config.latents_std, device=device).view(-1, 1, 1, 1)
        kinds = [type(module).__name__ for module in vae.decoder.modules()]
        self.slots = kinds.count('WanCausalConv3d')           # of the cache: one for each causal convolution

    def encode(self, frames):
        """Pictures (B, 4 F - 3, H, W, 3), uint8 or float in [0, 1] -> latents (B, F, 16, H / 8, W / 8)."""
        z = encode_clips(self.vae, frames, self.device)
        return (z - self.mean[:, 0]) / self.std[:, 0]

    def decode(self, z):
        """Latents (B, F, 16, h, w) of whole videos -> pictures (B, 4 F - 3, 8 h, 8 w, 3) in [0, 1]."""
        return torch.cat([self.stream()(video[None]) for video in z])

    def stream(self):
        """A function that decodes a video chunk by chunk: (B, n, 16, h, w) -> (B, 4 n, 8 h, 8 w, 3), 4 n - 3
        pictures the first time. Each causal convolution keeps its last two inputs between the calls."""
        cache = [None] * self.slots
        first = True

        @torch.no_grad()
        def decode(z):
            nonlocal first
            z = z.to(self.device).movedim(1, 2).float() * self.std + self.mean        # (B, 16, n, h, w)
            z = self.vae.post_quant_conv(z)
            pictures = []
            for latent in z.split(1, 2):
                pictures.append(self.vae.decoder(latent, feat_cache=cache, feat_idx=[0], first_chunk=first))
                first = False
            x = torch.cat(pictures, 2).clamp(-1, 1).movedim(1, -1)                    # (B, 4 n, 8 h, 8 w, 3)
            return (x + 1) / 2
        return decode

    @functools.cached_property
    def text_encoder(self):
        """(tokenizer, UMT5), loaded when the first caption is embedded."""
        from transformers import AutoTokenizer, UMT5EncoderModel
        tokenizer = AutoTokenizer.from_pretrained(f'{self.folder}/tokenizer')
        encoder = UMT5EncoderModel.from_pretrained(f'{self.folder}/text_encoder', dtype=torch.bfloat16)
        return tokenizer, encoder.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def embed(self, captions, cfg=None, first=None):
        """Captions -> (B, tokens of the longest caption, text_dim), 0 behind each caption's end. The empty
        one is its end mark, Wan's null prompt. With the cfg of a model, as that model reads them: (B,
        text_len, text_dim) float32."""
        tokenizer, encoder = self.text_encoder
        captions = [' '.join(html.unescape(html.unescape(caption)).split()) for caption in captions]
        tokens = tokenizer(captions, padding='longest', truncation=True, max_length=512, return_tensors='pt')
        tokens = tokens.to(self.device)
        text = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        text = text * tokens.attention_mask[..., None]
        return text if cfg is None else pad_text(text, cfg)


def pad_text(text, cfg):
    """Embedded captions (..., tokens, text_dim) -> (..., text_len, text_dim) float32, as models read them."""
    if text.shape[-1] != cfg.text_dim:
        raise BadInput(f'captions of {text.shape[-1]} numbers a word, where the model reads {cfg.text_dim}: '
                       'make its clips with its own text encoder')
    text = text[..., :cfg.text_len, :].float()
    return functional.pad(text, (0, 0, 0, cfg.text_len - text.shape[-2]))


def without_words(text, null_text, cfg):
    """The empty prompt null_text (tokens, text_dim) in place of text (B, text_len, text_dim): one for all, or
    B, if the model also reads the features of a picture, which stay."""
    words = pad_text(null_text[None], cfg)
    picture = getattr(cfg, 'image_len', 0)
    if not picture:
        return words
    return torch.cat([text[:, :picture], words.expand_as(text)[:, picture:]], 1)
