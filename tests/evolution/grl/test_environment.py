# SPDX-License-Identifier: Apache-2.0
import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from diffusers_learngene.evolution.grl.environment import (
    ANT,
    ARMS,
    LIFT,
    REACHER,
    LearngeneAntEnv,
    LearngeneReacherEnv,
)
from diffusers_learngene.evolution.grl.terrains import TERRAINS, height_field


def at_rest(**options):
    """An ant that starts exactly where it should."""
    environment = LearngeneAntEnv(**options)
    environment.reset(seed=0)
    environment.set_state(environment.init_qpos, environment.init_qvel)
    return environment


@pytest.mark.parametrize("name", [ANT, REACHER])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of unbounded observations
def test_gymnasium_is_content(name):
    environment = gymnasium.make(name)
    check_env(environment.unwrapped, skip_render_check=True)
    assert environment.spec.max_episode_steps == {ANT: 3000, REACHER: 50}[name]


@pytest.mark.parametrize("terrain", TERRAINS)
def test_terrains(terrain):
    field = height_field(terrain)
    inside = field[5:-5, 5:-5]
    assert field.shape == (600, 200) and np.allclose(field[:5], 1.8) and np.allclose(field[:, -5:], 1.8)
    assert (field[5:100, 5:-5] == 0).all() and (inside[-10:] == 0).all()  # a flat start, and a flat goal
    assert field.min() + 1e-9 >= -0.3 and field.min() > -LIFT
    highest = {"step": 1.05, "curve": 0.9, "bumpy": 0.36, "rubble": 0.675, "flat": 0}[terrain]
    assert inside.max() == pytest.approx(highest, abs=0.01)
    if terrain in ("step", "curve", "bumpy"):
        assert (inside == inside[:, :1]).all()


def test_the_steps_are_stairs():
    rises = np.diff(height_field("step")[:, 100]) / 1.5
    up, down = np.flatnonzero(rises[5:590] > 1e-9) + 6, np.flatnonzero(rises[5:590] < -1e-9) + 6
    assert list(up[:5]) == [100, 115, 130, 145, 160] and list(down[:5]) == [175, 190, 205, 220, 235]
    assert rises[[99, 259, 389]] == pytest.approx([0.1, 0.13, 0.1])


@pytest.mark.parametrize("terrain", ["bumpy", "rubble"])
def test_the_simulated_ground_is_the_field(terrain):
    """Rays from above hit it where the field says, in pits too."""
    import mujoco

    environment = at_rest(terrain=terrain)
    model, data, field = environment.model, environment.data, height_field(terrain)
    group = np.array([1, 0, 0, 0, 0, 0], np.uint8)
    hit = np.zeros(1, np.int32)
    for row, column in ((50, 60), (149, 60), (345, 120), (205, 30), (460, 77), (365, 100)):
        x, y = -20 + 40 * column / 199, -60 + 120 * row / 599
        far = mujoco.mj_ray(model, data, np.array([x, y, 10.0]), np.array([0, 0, -1.0]), group, 1, 1, hit, None)
        assert 10 - far == pytest.approx(field[row, column], abs=0.12)  # a cell is two triangles


def test_nobody_falls_through_a_pit():
    environment = at_rest(terrain="bumpy")
    position = environment.init_qpos.copy()
    position[1:3] = -60 + 120 * 344.5 / 599, 0.6  # over a groove of 0.3 m
    environment.set_state(position, environment.init_qvel)
    for _ in range(200):
        environment.step(np.zeros(8))
    assert -0.3 < environment.data.qpos[2] < 0.5


def test_observation_is_blind_and_reward_is_the_papers():
    environment = at_rest()
    assert environment.init_qpos[:3] == pytest.approx([0, -50, 0.75])
    before = environment.data.qpos[1]
    action = np.array([2.0, -1, 0.5, 0, 0, 0, 0, 0])  # beyond what the motors do
    observation, reward, terminated, truncated, info = environment.step(action)
    state = environment.data
    assert observation == pytest.approx(np.concatenate([state.qpos[2:], state.qvel])) and observation.shape == (27,)
    assert reward == pytest.approx((state.qpos[1] - before) / 0.05 - 0.2 * 5.25)
    assert not terminated and not truncated and info["y_position"] == state.qpos[1]
    other = at_rest()
    other.step(np.clip(action, -1, 1))
    assert np.array_equal(other.data.qpos, state.qpos)  # the motors clip


@pytest.mark.parametrize("place, prize", [((1, 56.99), 100), ((2, 3.5), 0), ((2, -31.0), 0)])
def test_an_episode_ends_at_the_goal_and_out_of_range(place, prize):
    environment = at_rest(terrain="flat")
    position, velocity = environment.init_qpos.copy(), environment.init_qvel.copy()
    position[place[0]] = place[1]
    velocity[1] = 5.0  # towards the goal
    environment.set_state(position, velocity)
    _, reward, terminated, _, _ = environment.step(np.zeros(8))
    assert terminated and (reward > 90) == bool(prize)


@pytest.mark.parametrize("create", [LearngeneAntEnv, LearngeneReacherEnv])
@pytest.mark.parametrize("where", ["qpos", "qvel"])
@pytest.mark.parametrize("value", [np.nan, 1e12])
def test_an_episode_ends_where_the_simulation_breaks(create, where, value, monkeypatch, tmp_path):
    """MuJoCo itself resets the body and goes on; a leap back to the start is no velocity."""
    monkeypatch.chdir(tmp_path)  # where MuJoCo writes its log
    environment = create()
    environment.reset(seed=0)
    action = np.full(environment.action_space.shape, 0.5)
    assert not environment.step(action)[2]
    getattr(environment.data, where)[1] = value
    observation, reward, terminated, truncated, info = environment.step(action)
    assert terminated and not truncated and np.isfinite(observation).all() and np.isfinite(reward)
    if create is LearngeneAntEnv:
        assert reward == pytest.approx(-0.2 * 0.25 * 8) and info["reward_forward"] == 0
    environment.reset(seed=0)
    assert not environment.step(action)[2]


def test_easing_and_errors():
    flat = LearngeneAntEnv("curve", height_scale=0.0)
    assert np.allclose(flat.model.hfield_data, LIFT / 2.4)
    environment = at_rest(control_cost=0.0)
    before = environment.data.qpos[1]
    assert environment.step(np.ones(8))[1] == pytest.approx((environment.data.qpos[1] - before) / 0.05)
    with pytest.raises(ValueError, match=r"terrain='sea' is not one of \['step', "):
        LearngeneAntEnv("sea")
    with pytest.raises(ValueError, match=r"height_scale=2 must lie in \[0, 1\]"):
        LearngeneAntEnv(height_scale=2)
    with pytest.raises(ValueError, match=r"task='tail' is not one of \['plain', "):
        LearngeneReacherEnv("tail")


def test_the_arms_differ():
    ends = set()
    for task in ARMS:
        environment = LearngeneReacherEnv(task)
        environment.reset(seed=0)
        for _ in range(10):
            observation = environment.step(np.array([0.3, -0.2]))[0]
        ends.add(tuple(observation.round(6)))
    assert len(ends) == len(ARMS)


@pytest.mark.parametrize("environment", [LearngeneAntEnv, LearngeneReacherEnv])
def test_pictures_without_a_screen(environment):
    world = environment(render_mode="rgb_array", width=64, height=48)
    world.reset(seed=0)
    try:
        picture = world.render()
    except RuntimeError as error:
        assert "install EGL" in str(error)  # what a machine says that has no library for it
        pytest.skip(str(error))
    assert picture.shape == (48, 64, 3) and picture.std() > 5
    world.close()


def test_a_machine_that_cannot_draw_says_what_is_missing(monkeypatch):
    world = LearngeneAntEnv(render_mode="rgb_array", width=64, height=48)
    monkeypatch.setattr(world.mujoco_renderer, "render", lambda _: (_ for _ in ()).throw(AttributeError("glGetError")))
    with pytest.raises(RuntimeError, match="cannot draw here.*glGetError.*libegl1"):
        world.render()
