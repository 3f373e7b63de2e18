"""
Codec "hunyuan": HunyuanVideo-1.5's own autoencoder and encoders of words, letters and pictures, through
diffusers and transformers.

    pip install -r requirements-wan.txt
    python data.py --world folder --videos DIR --pose_scale 1 --wan HunyuanVideo-1.5-Diffusers-480p_i2v ...

As with Wan's codec the first latent is one picture and every further one is four; a cell is 16 x 16 pixels.
The prompt is one tensor, as backbones/hunyuan.py reads it: rows of the first picture (SigLIP), of letters
between quotation marks (byT5), and of words (Qwen2.5-VL).
"""
import functools

import torch
from torch.nn import functional

from camera import BadInput
from worlds.wan import encode_clips, pad_text


class Hunyuan:
    """The interface of Dct in data.py. The autoencoder computes in float32, the others in bfloat16."""
    stride = 4                                                # pictures in a latent
    across = 16                                               # pixels in a latent's cell
    memory = 8                                                # latents that are decoded again with each chunk

    def __init__(self, folder, device='cpu'):
        try:
            from diffusers import AutoencoderKLHunyuanVideo15
        except ImportError:
            raise BadInput('HunyuanVideo-1.5\'s autoencoder needs a newer diffusers: pip install -U '
                           '-r requirements-wan.txt') from None
        self.folder = folder
        self.device = device
        vae = AutoencoderKLHunyuanVideo15.from_pretrained(f'{folder}/vae', low_cpu_mem_usage=False)
        self.vae = vae.float().to(device).eval().requires_grad_(False)
        self.scale = vae.config.scaling_factor
        if device != 'cpu':                                   # whole pictures of 480 x 832 take tens of GB
            self.vae.enable_tiling()

    def encode(self, frames):
        """Pictures (B, 4 F - 3, H, W, 3), uint8 or float in [0, 1] -> latents (B, F, 32, H / 16, W / 16)."""
        return encode_clips(self.vae, frames, self.device) * self.scale

    @torch.no_grad()
    def decode(self, z):
        """Latents (B, F, 32, h, w) of whole videos -> pictures (B, 4 F - 3, 16 h, 16 w, 3) in [0, 1]."""
        z = z.to(self.device).movedim(1, 2).float() / self.scale              # (B, 32, F, h, w)
        x = torch.cat([self.vae.decode(video[None]).sample for video in z])
        return (x.clamp(-1, 1).movedim(1, -1) + 1) / 2

    def stream(self):
        """A function that decodes a video chunk by chunk: (B, n, 32, h, w) -> (B, 4 n, 16 h, 16 w, 3), or
        4 n - 3 pictures the first time. It decodes the last `memory` latents once more, so the first pictures
        are exactly those of the whole video, and later ones nearly."""
        past = None

        def decode(z):
            nonlocal past
            seen = z if past is None else torch.cat([past, z], 1)
            pictures = self.decode(seen)
            if past is not None:
                pictures = pictures[:, -4 * z.shape[1]:]
            past = seen[:, -self.memory:]
            return pictures
        return decode

    def load(self, name, kind):
        """An encoder of the folder, loaded when it is first needed."""
        model = kind.from_pretrained(f'{self.folder}/{name}', dtype=torch.bfloat16)
        return model.to(self.device).eval().requires_grad_(False)

    @functools.cached_property
    def encoders(self):
        """(tokenizer, Qwen2.5-VL, tokenizer, byT5, picture processor, SigLIP)."""
        import transformers as t
        return (
            t.AutoTokenizer.from_pretrained(f'{self.folder}/tokenizer'),
            self.load('text_encoder', t.Qwen2_5_VLTextModel),
            t.AutoTokenizer.from_pretrained(f'{self.folder}/tokenizer_2'),
            self.load('text_encoder_2', t.T5EncoderModel),
            t.SiglipImageProcessor.from_pretrained(f'{self.folder}/feature_extractor'),
            self.load('image_encoder', t.SiglipVisionModel),
        )

    @torch.no_grad()
    def embed(self, captions, cfg=None, first=None):
        """Captions, and latents (B, 1, 32, h, w) of the pictures to begin with, if any -> (B, rows, text_dim)
        or, with the cfg of a model, as that reads them: (B, text_len, text_dim) float32."""
        from diffusers import HunyuanVideo15ImageToVideoPipeline as Pipeline
        tokenizer, qwen, letters, byt5, processor, siglip = self.encoders
        words, real = Pipeline._get_mllm_prompt_embeds(qwen, tokenizer, captions, self.device)
        words = (words * real[..., None])[:, :real.sum(1).max()]
        glyphs, real = Pipeline._get_byt5_prompt_embeds(letters, byt5, captions, self.device)
        glyphs = glyphs * real[..., None]
        side = siglip.config.image_size // siglip.config.patch_size
        picture = words.new_zeros(len(captions), side ** 2, siglip.config.hidden_size)
        if first is not None:
            pixels = (self.decode(first)[:, 0] * 255).round().byte().cpu().numpy()
            for row, image in zip(picture, pixels):
                row.copy_(Pipeline._get_image_embeds(siglip, processor, image, self.device)[0])
        dim = words.shape[-1]
        picture, glyphs = (functional.pad(part, (0, dim - part.shape[-1])) for part in (picture, glyphs))
        text = torch.cat([picture, glyphs, words], 1)
        if cfg is None:
            return text
        return pad_text(text, cfg)
