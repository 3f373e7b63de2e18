"""HunyuanVideo-1.5's own autoencoder and encoders, the real classes at tiny size, and the whole recipe on them."""
import json

import imageio.v3 as iio
import pytest
import torch

diffusers = pytest.importorskip('diffusers', reason='pip install -r requirements-wan.txt')
transformers = pytest.importorskip('transformers', reason='pip install -r requirements-wan.txt')

from backbones.hunyuan import HunyuanConfig
from camera import keys_to_poses
from common import load_model
from conftest import run
from data import Clips, find_codec, get_batch
from test_folder import gradient, realestate
from test_hunyuan import DIFFUSERS
from worlds.hunyuan import Hunyuan

DIM, PICTURE, LETTERS = 48, 4, 256                            # numbers a word; rows of a picture, of letters


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder like HunyuanVideo-1.5-Diffusers-480p_i2v."""
    d = tmp_path_factory.mktemp('hunyuan')
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanVideo15(block_out_channels=(8, 8, 16, 32, 64), layers_per_block=1)
    for p in vae.parameters():                                # larger than usual, so that the past shows in a picture
        torch.nn.init.normal_(p, std=.1) if p.ndim < 3 else torch.nn.init.xavier_normal_(p, gain=1.5)
    vae.save_pretrained(d / 'vae')
    letters = transformers.ByT5Tokenizer(extra_ids=0)
    letters.save_pretrained(d / 'tokenizer_2')
    letters.chat_template = '{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}'
    letters.save_pretrained(d / 'tokenizer')
    qwen = transformers.Qwen2_5_VLTextConfig(
        vocab_size=300, hidden_size=DIM, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, rope_parameters={'rope_type': 'default', 'mrope_section': [4, 4, 4], 'rope_theta': 1e6})
    transformers.Qwen2_5_VLTextModel(qwen).save_pretrained(d / 'text_encoder')
    byt5 = transformers.T5Config(vocab_size=300, d_model=24, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(byt5).save_pretrained(d / 'text_encoder_2')
    siglip = transformers.SiglipVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                             num_attention_heads=2, image_size=28, patch_size=14)
    transformers.SiglipVisionModel(siglip).save_pretrained(d / 'image_encoder')
    processor = transformers.SiglipImageProcessor(size={'height': 28, 'width': 28})
    processor.save_pretrained(d / 'feature_extractor')
    sizes = DIFFUSERS | dict(in_channels=65, out_channels=32)
    diffusers.HunyuanVideo15Transformer3DModel(**sizes).save_pretrained(d / 'transformer')
    config = json.loads((d / 'transformer' / 'config.json').read_text())
    config |= dict(image_len=PICTURE, text_len=PICTURE + LETTERS + 40, chunk=1)
    (d / 'transformer' / 'config.json').write_text(json.dumps(config))
    return d


@pytest.fixture(scope='module')
def codec(folder):
    codec = find_codec(str(folder))
    assert isinstance(codec, Hunyuan)
    return codec


def test_streamed_decoding_equals_the_whole(codec):
    z = torch.randn(2, 6, 32, 2, 3)
    want = codec.decode(z)
    assert want.shape == (2, 21, 32, 48, 3) and want.std() > .05
    decode = codec.stream()
    parts = [decode(x) for x in z.split([1, 2, 3], 1)]
    assert [p.shape[1] for p in parts] == [1, 8, 12]
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=0, atol=1e-5)
    alone = codec.stream()(z[:, 1:3])                         # without its past a latent looks different
    assert (alone[:, -1] - parts[1][:, -1]).abs().max() > 1e-3
    long = codec.stream()
    assert [long(x).shape[1] for x in torch.randn(1, 12, 32, 2, 2).split(4, 1)] == [13, 16, 16]


def test_encoding_is_causal_and_scaled(codec):
    frames = torch.rand(2, 9, 32, 48, 3)
    z = codec.encode(frames)
    assert z.shape == (2, 3, 32, 2, 3)
    torch.testing.assert_close(codec.encode(frames[:, :5]), z[:, :2], rtol=0, atol=1e-5)
    with torch.no_grad():
        mean = codec.vae.encode(frames[1:].movedim(-1, 1) * 2 - 1).latent_dist.mean.movedim(2, 1)
    torch.testing.assert_close(z[1:], mean * 1.03682, rtol=0, atol=1e-5)


def test_the_prompt_is_a_picture_letters_and_words(codec):
    """Rows of zeros where there are none; what a padded caption says does not depend on its neighbour."""
    first = codec.encode(torch.rand(2, 1, 32, 32, 3))
    text = codec.embed(['a room', 'a sign that says "open"'], first=first)
    assert text.shape[2] == DIM and text.shape[1] > PICTURE + LETTERS
    picture, letters, words = text.split([PICTURE, LETTERS, text.shape[1] - PICTURE - LETTERS], 1)
    assert picture[..., :16].any(-1).all() and not picture[..., 16:].any() and not torch.equal(picture[0], picture[1])
    assert not letters[0].any() and 0 < letters[1].any(-1).sum() < LETTERS
    n = words.any(-1).sum(1)
    assert 0 < n[0] < n[1] == words.shape[1]
    alone = codec.embed(['a room'])
    assert not alone[:, :PICTURE].any()
    torch.testing.assert_close(alone[0, PICTURE + LETTERS:], words[0, :n[0]], rtol=0, atol=.05)      # bfloat16
    cfg = HunyuanConfig(text_dim=DIM, text_len=PICTURE + LETTERS + 8)
    assert codec.embed(['a room'], cfg, first[:1]).shape == (1, PICTURE + LETTERS + 8, DIM)


def test_from_video_to_walk(folder, tmp_path):
    videos = tmp_path / 'videos'
    videos.mkdir()
    for name in 'ab':
        iio.imwrite(videos / f'{name}.mp4', gradient(33, 48, 64), fps=16, codec='libx264', macro_block_size=2)
        realestate(videos / f'{name}.txt', keys_to_poses('wl*8,w*8,j*8,s*8'))
        (videos / f'{name}.caption').write_text('a grey room')
    data, out = str(tmp_path / 'clips'), str(tmp_path / 'out')
    run('data.py', '--world', 'folder', '--videos', videos, '--pose_scale', 1, '--height', 48, '--width', 48,
        '--clips', 4, '--val_clips', 2, '--frames', 17, '--wan', folder, '--out', data)
    clips = Clips(data, 'val')
    z, poses, _, text = clips.read(0)
    assert z.shape == (5, 32, 3, 3) and poses.shape == (5, 4, 4) and text[:PICTURE].any(-1).all()
    assert clips.truth(2, 5).shape == (2, 17, 48, 48, 3)
    cfg = HunyuanConfig(text_dim=DIM, text_len=PICTURE + LETTERS + 40, image_len=PICTURE)
    batch = get_batch(Clips(data), 0, 16, 3, cfg)                     # a picture's features go with its window alone
    firsts = torch.stack([Clips(data).read(i)[0][0].float() for i in range(4)])
    starts = (batch.x0[:, 0, None] == firsts).flatten(2).all(2).any(1)
    assert 0 < starts.sum() < 16 and torch.equal(batch.text[:, :PICTURE].any(-1).all(-1), starts)
    assert torch.equal(batch.null_text[:, :PICTURE], batch.text[:, :PICTURE])     # without the prompt the picture stays
    nothing = find_codec(str(folder)).embed([''], cfg)[:, PICTURE:].expand(16, -1, -1)
    torch.testing.assert_close(batch.null_text[:, PICTURE:], nothing, rtol=0, atol=.05)               # bfloat16
    few = ('--steps', 2, '--batch', 2, '--frames', 5, '--data', data, '--out', out)
    text = run('finetune_camera.py', '--init', folder, '--camera', 'plucker+prope', '--sink', True, '--sample_steps', 2,
               *few)
    assert 'start from' in text
    run('train_ar.py', '--init', f'{out}/camera.safetensors', '--sample_steps', 2, *few)
    run('distill_ode.py', '--init', f'{out}/ar.safetensors', '--pairs', 4, '--teacher_steps', 4, *few)
    kept = Clips(f'{out}/pairs-causal').read(0, ['text'])[0]           # words too, behind rows of zeros for letters
    assert kept[:PICTURE].any(-1).all() and not kept[PICTURE:-40].any() and kept[-1].any()
    run('distill_dmd.py', '--init', f'{out}/ode.safetensors', '--score', f'{out}/camera.safetensors', '--before', 0,
        *few)
    assert load_model(f'{out}/dmd.safetensors')[0].cfg.in_dim == 32
    for ckpt in ('ar', 'dmd'):
        run('stream.py', '--ckpt', f'{out}/{ckpt}.safetensors', '--steps', 2, '--data', data, '--keys', 'w*4,wl*2',
            '--out', f'{out}/walk.mp4')
        assert len(iio.imread(f'{out}/walk.mp4')) == 25
