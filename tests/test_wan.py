"""Wan2.1's own autoencoder and text encoder, the real classes at tiny size, and the whole recipe on them: from a video
with a RealEstate10K file and a checkpoint in Wan's layout to a streamed mp4."""
import json

import imageio.v3 as iio
import pytest
import torch

diffusers = pytest.importorskip('diffusers', reason='pip install -r requirements-wan.txt')
transformers = pytest.importorskip('transformers', reason='pip install -r requirements-wan.txt')

from backbones.layouts import save_wan
from camera import BadInput, keys_to_poses
from conftest import ROOT, run
from data import Clips, find_codec, get_batch
from model import ModelConfig
from test_folder import gradient, realestate
from test_model import tiny_model
from worlds.wan import Wan, pad_text

DIM, N = 8, 33


@pytest.fixture(scope='module')
def wan(tmp_path_factory):
    """A folder like Wan-AI/Wan2.1-T2V-1.3B-Diffusers, with the network beside it in Wan's own layout."""
    import tokenizers
    d = tmp_path_factory.mktemp('wan')
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    for p in vae.parameters():                                # larger than usual, so that the past shows in a picture
        torch.nn.init.normal_(p, std=.1) if p.ndim < 3 else torch.nn.init.xavier_normal_(p, gain=1.5)
    vae.save_pretrained(d / 'vae')
    words = {w: i for i, w in enumerate(['<pad>', '</s>', '<unk>', 'a', 'grey', 'room', 'walk'])}
    t = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='<unk>'))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    t.post_processor = tokenizers.processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=t, pad_token='<pad>', eos_token='</s>',
                                                     unk_token='<unk>')
    tokenizer.save_pretrained(d / 'tokenizer')
    umt5 = transformers.UMT5Config(vocab_size=len(words), d_model=DIM, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    transformers.UMT5EncoderModel(umt5).save_pretrained(d / 'text_encoder')
    model = tiny_model(camera='none', chunk=4, first_chunk=4, shift=5.0, text_len=512)
    assert model.cfg.text_dim == DIM
    save_wan(str(d / 'transformer'), model)
    return d


@pytest.fixture(scope='module')
def codec(wan):
    return Wan(str(wan))


def test_streamed_decoding_equals_the_whole(codec):
    """Against diffusers' own whole decode; in pieces of 1, 2 and 3 latents."""
    z = torch.randn(1, 6, 16, 4, 4)
    with torch.no_grad():
        want = codec.vae.decode(z.movedim(1, 2) * codec.std + codec.mean).sample.movedim(1, -1) / 2 + .5
    assert want.shape == (1, 21, 32, 32, 3) and want.std() > .05
    torch.testing.assert_close(codec.decode(z), want, rtol=0, atol=1e-5)
    decode = codec.stream()
    parts = [decode(x) for x in z.split([1, 2, 3], 1)]
    assert [p.shape[1] for p in parts] == [1, 8, 12]
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=0, atol=1e-5)
    alone = codec.stream()(z[:, 1:3])                         # without its past a latent looks different
    assert (alone[:, -1] - parts[1][:, -1]).abs().max() > 1e-3


def test_encoding_is_causal_and_normalised(codec):
    frames = torch.rand(2, 9, 32, 32, 3)
    z = codec.encode(frames)
    assert z.shape == (2, 3, 16, 4, 4)
    torch.testing.assert_close(codec.encode(frames[:, :5]), z[:, :2], rtol=0, atol=1e-5)
    pixels = (frames * 255).round()
    torch.testing.assert_close(codec.encode(pixels.byte()), codec.encode(pixels / 255), rtol=0, atol=1e-5)
    with torch.no_grad():
        mean = codec.vae.encode(frames[1:].movedim(-1, 1) * 2 - 1).latent_dist.mean[0, :, 1]
    torch.testing.assert_close(z[1, 1] * codec.std[:, 0] + codec.mean[:, 0], mean, rtol=0, atol=1e-5)


def test_text_ends_in_zeros_and_does_not_see_its_padding(codec):
    short, long = codec.embed(['a room', 'a grey  &amp;amp;  room walk'])
    assert (short[3:] == 0).all() and (short[:3].abs().sum(1) > 0).all() and len(long) == 6
    torch.testing.assert_close(codec.embed(['a room'])[0], short[:3], rtol=0, atol=.05)   # bfloat16
    cfg = ModelConfig(text_dim=DIM, text_len=4)
    assert codec.embed(['a grey room walk a'], cfg).shape == (1, 4, DIM)
    null = codec.embed([''], cfg)[0]                        # the end mark, not zeros
    assert null[0].abs().sum() > 0 and (null[1:] == 0).all()
    with pytest.raises(BadInput, match='captions of 8 numbers'):
        codec.embed(['a'], ModelConfig(text_dim=4096, text_len=512))
    long = torch.randn(2, 3, DIM).bfloat16()
    assert torch.equal(pad_text(long, cfg)[:, :3], long.float()) and (pad_text(long, cfg)[:, 3:] == 0).all()


def test_a_codec_is_loaded_once(wan):
    codec = find_codec(str(wan))
    assert codec is find_codec(str(wan)) and codec.stride == 4 and find_codec().stride == 1


def test_from_video_to_walk(wan, tmp_path):
    videos = tmp_path / 'videos'
    videos.mkdir()
    c2w = keys_to_poses('wl*8,w*8,j*8,s*8')
    for name in 'ab':
        iio.imwrite(videos / f'{name}.mp4', gradient(N, 48, 64), fps=16, codec='libx264', macro_block_size=2)
        realestate(videos / f'{name}.txt', c2w)
        (videos / f'{name}.caption').write_text('a grey room')
    data, out = str(tmp_path / 'clips'), str(tmp_path / 'out')
    few = ('--steps', 2, '--batch', 2, '--frames', 5, '--data', data, '--out', out)
    make = ('data.py', '--world', 'folder', '--videos', videos, '--pose_scale', 1, '--height', 32, '--width', 32,
            '--clips', 4, '--val_clips', 2, '--out', data)
    assert 'hold 1, 5, 9, 13' in run(*make, '--frames', 16, '--wan', wan, ok=False)
    assert 'vae/config.json' in run(*make, '--frames', 17, '--wan', tmp_path, ok=False)
    run(*make, '--frames', 29, '--wan', wan)
    clips = Clips(data, 'val')
    z, poses, _, text = clips.read(0)
    assert z.shape == (8, 16, 4, 4) and poses.shape == (8, 4, 4) and text.shape == (4, DIM)
    assert clips.truth(2, 5).shape == (2, 17, 32, 32, 3)
    for i, name in ((0, 'a'), (1, 'b')):                      # pose i belongs to picture 4 i
        blue = clips.read(i, ['frames'])[0][..., 2].float().mean((1, 2))
        first = round((blue[0] / 12).item())
        poses = clips.read(i)[1]
        want = c2w[first].inverse() @ c2w[first:first + 29:4]
        torch.testing.assert_close(poses[0].inverse() @ poses, want, rtol=0, atol=1e-4)
    batch = get_batch(clips, 0, 2, 5, ModelConfig(text_dim=DIM, text_len=512))
    assert batch.text.shape == (2, 512, DIM)
    assert (batch.text[:, 4:] == 0).all() and batch.text[:, :4].abs().sum() > 0
    null = Wan(str(wan)).embed(['']).bfloat16()
    assert null.shape == (1, 1, DIM)
    assert torch.equal(batch.null_text, pad_text(null, ModelConfig(text_dim=DIM, text_len=512)))

    run('finetune_camera.py', '--init', wan / 'transformer', '--camera', 'plucker', '--sample_steps', 2, *few)
    run('train_ar.py', '--init', f'{out}/camera.safetensors', '--chunk', 2, '--sample_steps', 2, *few)
    run('distill_ode.py', '--init', f'{out}/ar.safetensors', '--pairs', 4, '--teacher_steps', 4, *few)
    run('distill_dmd.py', '--init', f'{out}/ode.safetensors', '--score', f'{out}/camera.safetensors', '--before', 0,
        *few)
    for ckpt in ('ar', 'dmd'):
        run('stream.py', '--ckpt', f'{out}/{ckpt}.safetensors', '--steps', 2, '--data', data, '--keys', 'w*4,wl*2',
            '--out', f'{out}/walk.mp4')
        assert iio.imread(f'{out}/walk.mp4').shape == (25, 384, 384, 3)
    few_step = '--ckpt', f'{out}/dmd.safetensors', '--data', data
    run('experiments.score', *few_step, '--out', f'{out}/score.json')
    assert len(json.loads(open(f'{out}/score.json').read())['psnr']) == 17
    run('experiments.bench', *few_step, '--out', f'{out}/bench.json', '--frames', 240)
    assert json.loads(open(f'{out}/bench.json').read())
    iio.imwrite(tmp_path / 'drawing.png', gradient(1, 50, 90)[0])
    run('stream.py', '--ckpt', f'{out}/ar.safetensors', '--steps', 2, '--data', data, '--keys', 'w*4',
        '--first', tmp_path / 'drawing.png', '--out', f'{out}/drawn.mp4')
    assert len(iio.imread(f'{out}/drawn.mp4')) == 17

    # with minWM's numbers
    recipe, minwm = f'{ROOT}/expected/minwm', f'{out}/minwm'
    few = ('--steps', 2, '--batch', 2, '--frames', 8, '--data', data, '--out', minwm)
    for script, flags, start, more in (
            ('finetune_camera', 'finetune_camera', wan / 'transformer', ()),
            ('train_ar', 'train_ar', f'{minwm}/camera.safetensors', ()),
            ('distill_ode', 'distill_ode', f'{minwm}/ar.safetensors', ('--pairs', 2)),
            ('distill_ode', 'distill_cd', f'{minwm}/ar.safetensors', ()),
            ('distill_dmd', 'distill_dmd', f'{minwm}/ode.safetensors', ('--score', f'{minwm}/camera.safetensors'))):
        run(f'{script}.py', f'@{recipe}/{flags}.txt', '--init', start, *more, *few)
    prompted = '--data', data, '--first', 'prompt', '--keys', 'w*7'
    run('stream.py', '--ckpt', f'{minwm}/dmd.safetensors', *prompted, '--out', f'{minwm}/walk.mp4')

    # a checkpoint from elsewhere, as it comes
    run('stream.py', '--ckpt', wan / 'transformer', *prompted, '--prompt', 'grey', '--out', f'{out}/wan.mp4')
    assert len(iio.imread(f'{out}/wan.mp4')) == 29
    state = tiny_model(camera='prope', chunk=4, first_chunk=4, shift=5.0, text_len=512).state_dict()
    theirs = {f'model.{name}': tensor for name, tensor in state.items()}       # minWM's
    torch.save({'generator_ema': theirs}, tmp_path / 'action2v.pt')
    (tmp_path / 'config.json').write_text((wan / 'transformer' / 'config.json').read_text())
    run('stream.py', '--ckpt', tmp_path / 'action2v.pt', *prompted, '--steps', 4, '--out', f'{out}/minwm.mp4')
    assert '--first prompt' in run('stream.py', '--ckpt', wan / 'transformer', '--data', data, ok=False)
