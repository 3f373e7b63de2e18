"""
World "doom": frames and exact poses of a real game, by ViZDoom (its wheel carries the Freedoom assets).

    pip install vizdoom
    python data.py --world doom --map my_way_home
"""
import os
import tempfile

import numpy as np
import torch
from torch.nn import functional

from camera import BadInput, make_pose

UNITS = 64                        # map units in a metre, by our convention
# 90 degrees wide, 4:3, and the engine stretches upwards by 1.2 (measured on walls)
DOOM_K = torch.tensor([.5, .8, .5, .5])
HIDDEN = 'hud', 'weapon', 'crosshair', 'decals', 'particles', 'effects_sprites', 'messages', 'corpses'
BUTTONS = 'MOVE_FORWARD', 'MOVE_BACKWARD', 'MOVE_LEFT', 'MOVE_RIGHT', 'TURN_LEFT_RIGHT_DELTA'
VARIABLES = 'POSITION_X', 'POSITION_Y', 'POSITION_Z', 'ANGLE'


def start_game(name):
    """The game on one of ViZDoom's maps, without HUD and weapon."""
    try:
        import vizdoom as vzd
    except ImportError:
        raise BadInput('--world doom needs ViZDoom: pip install vizdoom') from None
    scenario = os.path.join(vzd.scenarios_path, name + '.cfg')
    if not os.path.exists(scenario):
        maps = sorted(file[:-4] for file in os.listdir(vzd.scenarios_path) if file.endswith('.cfg'))
        raise BadInput(f'--map {name}: not a map that ships with ViZDoom: {", ".join(maps)}')
    game = vzd.DoomGame()
    game.load_config(scenario)
    game.set_doom_config_path(os.path.join(tempfile.gettempdir(), '_vizdoom.ini'))
    game.set_window_visible(False)
    game.set_screen_format(vzd.ScreenFormat.RGB24)
    game.set_screen_resolution(vzd.ScreenResolution.RES_320X240)
    for thing in HIDDEN:
        getattr(game, f'set_render_{thing}')(False)
    game.set_available_buttons([getattr(vzd.Button, name) for name in BUTTONS])
    game.set_available_game_variables([getattr(vzd.GameVariable, name) for name in VARIABLES])
    game.set_episode_timeout(0)
    game.init()
    return game


def play(game, cfg, r):
    """A clip of a random keyboard policy: frames (F, H, W, 3) uint8 and c2w (F, 4, 4) float32. Keys are held
    for 3 to 8 frames; a frame is 1 to 3 tics of the game, drawn per clip."""
    frames, poses = [], []
    while len(frames) < cfg.frames:
        if not frames or game.is_episode_finished():          # it may end early: the vest is found
            game.set_seed(int(r.integers(2 ** 31)))
            game.new_episode()
            game.make_action([0, 0, 0, 0, float(r.uniform(-180, 180))], 1)
            tics = int(r.integers(1, 4))
            degrees = r.uniform(1.5, 10)                      # a frame
            hold = 0
            frames, poses = [], []
        state = game.get_state()
        x, y, z, angle = state.game_variables                 # x east, y north, z up, angles to the left
        position = [-y / UNITS, -z / UNITS, x / UNITS]
        poses.append((position, -angle, 0.))
        picture = torch.from_numpy(state.screen_buffer.copy()).permute(2, 0, 1).float()
        picture = functional.interpolate(picture[None], (cfg.height, cfg.width), mode='area')[0]
        frames.append(picture.permute(1, 2, 0))

        if hold == 0:
            keys = r.choice('w wl wj l j a d s'.split(), p=[.3, .17, .17, .1, .1, .05, .05, .06])
            hold = r.integers(3, 9)
        hold -= 1
        turn = ('l' in keys) - ('j' in keys)                  # -1, 0 or 1
        game.make_action([float(key in keys) for key in 'wsad'] + [degrees * turn / tics], tics)
    position, yaw, pitch = (torch.tensor(x, dtype=torch.float64) for x in zip(*poses))
    return torch.stack(frames).round().byte(), make_pose(position, yaw, pitch).float()


def doom_clips(cfg, split, indices):
    """Record clips: dict of tensors as a shard of data.py holds them, and captions."""
    game = start_game(cfg.map)
    frames, paths = [], []
    for i in indices:
        pictures, c2w = play(game, cfg, np.random.default_rng([cfg.seed, 3 + split, i]))
        frames.append(pictures)
        paths.append(c2w)
    game.close()
    tensors = dict(frames=torch.stack(frames), c2w=torch.stack(paths), K=DOOM_K.repeat(len(paths), 1))
    return tensors, [f'doom {cfg.map}'] * len(paths)
