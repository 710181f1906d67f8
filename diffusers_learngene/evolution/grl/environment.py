# SPDX-License-Identifier: Apache-2.0
"""Two gymnasium environments: the ant of the paper, and an arm for machines and evenings that are small.

`LearngeneAnt-v0`: gymnasium's own MuJoCo ant (heavier, and with more grip, as in the paper) at the near end of one of
four height fields. It is blind: 27 numbers of its body are all that it observes. Every step of 0.05 s pays

    r = v_y - c |a|^2        c = 0.2, a the action as it was chosen, before the motors limit it to [-1, 1]

and 100 beyond y = 57 m, where the episode ends; else it ends after 3,000 steps, or if the simulation breaks: that step
pays no velocity, because MuJoCo has put the ant back to where it began.

`LearngeneReacher-v0`: gymnasium's MuJoCo reacher, two joints that should bring a fingertip to a random target within
50 steps, with four bodies. A step costs the distance to the target and |a|^2: a newborn's thrashing is what is dear.
It, too, ends if the simulation breaks.
"""

import os
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.envs.mujoco.reacher_v5 import ReacherEnv
from gymnasium.spaces import Box
from numpy.typing import NDArray

from .terrains import COLUMNS, LENGTH, ROWS, WIDTH, height_field


__all__ = ["ANT", "ARMS", "REACHER", "LearngeneAntEnv", "LearngeneReacherEnv"]

ANT, REACHER = "LearngeneAnt-v0", "LearngeneReacher-v0"
START, GOAL, PRIZE = -50.0, 57.0, 100.0
LOWEST, HIGHEST = -30.0, 3.0  # of the torso, metres
LIFT = 0.4  # metres: MuJoCo has no heights below zero, so the field is lifted and its geometry lowered
_TOP = 2.0
_BREAKS = [
    int(kind)
    for kind in (
        mujoco.mjtWarning.mjWARN_BADQPOS,
        mujoco.mjtWarning.mjWARN_BADQVEL,
        mujoco.mjtWarning.mjWARN_BADQACC,
        mujoco.mjtWarning.mjWARN_BADCTRL,
    )
]

# What of the reacher differs by task: mass, damping of the joints and strength of the motors, of gymnasium's own.
ARMS = {
    "plain": (1.0, 1.0, 1.0),
    "heavy": (2.5, 1.0, 1.0),
    "stiff": (1.0, 3.0, 1.0),
    "weak": (1.0, 1.0, 0.5),
    "light": (0.5, 0.7, 1.5),
}


class _Simulated(MujocoEnv):
    """What both share: it is seen when a simulation breaks, and pictures need no screen."""

    def broken(self) -> bool:
        """Whether a number became NaN or huge since the last reset; MuJoCo warns, starts anew from the first position,
        and would go on as if nothing had been."""
        return bool(self.data.warning.number[_BREAKS].any()) or not np.isfinite(self.data.qpos).all()

    def render(self) -> Any:
        """As gymnasium's; without a display EGL is used (or what MUJOCO_GL names).

        Raises:
            RuntimeError: this machine has no library that can draw without a screen.
        """
        if sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")
        try:
            return super().render()
        except (AttributeError, ImportError, RuntimeError, mujoco.FatalError) as error:
            raise RuntimeError(
                f"MuJoCo cannot draw here with MUJOCO_GL={os.environ.get('MUJOCO_GL')!r} ({error}): install EGL "
                "(on Debian and Ubuntu: apt install libegl1) or OSMesa (libosmesa6, with MUJOCO_GL=osmesa)."
            ) from error


class LearngeneAntEnv(_Simulated):
    """The ant on a terrain; see the module.

    Args:
        terrain: "step", "curve", "bumpy", "rubble", the paper's; or "flat".
        control_cost: c above; 0.2 in the paper, which a newborn can hardly earn: it learns to stand still first.
        height_scale: of the terrain; 1 in the paper.
        width, height: of rendered pictures, in pixels.

    Raises:
        ValueError: an unknown terrain, or a scale that is not from 0 to 1.
    """

    metadata = {"render_modes": ["human", "rgb_array", "depth_array", "rgbd_tuple"], "render_fps": 20}

    def __init__(
        self,
        terrain: str = "step",
        *,
        control_cost: float = 0.2,
        height_scale: float = 1.0,
        render_mode: str | None = None,
        width: int = 480,
        height: int = 270,
    ) -> None:
        if not 0 <= height_scale <= 1:
            raise ValueError(f"height_scale={height_scale} must lie in [0, 1].")
        self.terrain, self.control_cost = terrain, control_cost
        self._heights = height_scale * height_field(terrain)
        camera = {"trackbodyid": 1, "distance": 7.0, "elevation": -22.0, "azimuth": 40.0}
        super().__init__(
            "ant.xml",
            frame_skip=5,
            observation_space=Box(-np.inf, np.inf, shape=(27,), dtype=np.float64),
            render_mode=render_mode,
            width=width,
            height=height,
            default_camera_config=camera,
        )

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        model = mujoco.MjModel.from_xml_string(_ant_on_a_field(Path(self.fullpath)))
        model.hfield_data[:] = ((self._heights + LIFT) / (_TOP + LIFT)).ravel()
        model.vis.global_.offwidth, model.vis.global_.offheight = self.width, self.height
        model.vis.quality.shadowsize = 0  # of 240,000 triangles, which a machine without a GPU draws for seconds
        return model, mujoco.MjData(model)

    def step(  # type: ignore[override]  # a plain float is a reward, too
        self, action: NDArray[Any]
    ) -> tuple[NDArray[np.float64], float, bool, bool, dict[str, Any]]:
        before = self.data.qpos[1]
        self.data.ctrl[:] = action
        mujoco.mj_step(self.model, self.data, nstep=self.frame_skip)
        y, z = self.data.qpos[1:3]
        observation = self._observe()
        velocity, effort = (y - before) / self.dt, self.control_cost * float(np.dot(action, action))
        broken = self.broken()
        if broken:
            velocity = 0.0
        ended = broken or not (LOWEST <= z <= HIGHEST and np.isfinite(observation).all())
        arrived = bool(y > GOAL) and not broken
        reward = float(velocity - effort + PRIZE * arrived)
        if self.render_mode == "human":
            self.render()
        info = {"y_position": float(y), "reward_forward": float(velocity), "reward_control": -effort}
        return observation, reward, arrived or ended, False, info

    def reset_model(self) -> NDArray[np.float64]:
        noise = self.np_random.uniform(-0.1, 0.1, self.model.nq)
        self.set_state(self.init_qpos + noise, self.init_qvel + 0.1 * self.np_random.standard_normal(self.model.nv))
        return self._observe()

    def _get_reset_info(self) -> dict[str, float]:
        return {"y_position": float(self.data.qpos[1])}

    def _observe(self) -> NDArray[np.float64]:
        return np.concatenate([self.data.qpos[2:], self.data.qvel])  # (13 + 14,)


def _ant_on_a_field(path: Path) -> str:
    """gymnasium's ant.xml with the paper's density, friction and start, and a height field for a floor."""
    root = ElementTree.parse(path).getroot()

    def find(name: str) -> ElementTree.Element:
        element = root.find(name)
        if element is None:
            raise RuntimeError(f"{path} has no {name}: this gymnasium has another ant than version 1.4.")
        return element

    find("default/geom").attrib |= {"density": "50", "friction": "1.5 0.5 0.5"}
    find("worldbody/body[@name='torso']").set("pos", f"0 {START} 0.75")
    find("asset/material[@name='MatPlane']").attrib |= {"reflectance": "0", "texrepeat": "20 60"}
    size = f"{WIDTH / 2} {LENGTH / 2} {_TOP + LIFT} 0.1"
    ElementTree.SubElement(find("asset"), "hfield", name="terrain", nrow=str(ROWS), ncol=str(COLUMNS), size=size)
    floor = find("worldbody/geom[@name='floor']")
    floor.attrib |= {"type": "hfield", "hfield": "terrain", "pos": f"0 0 {-LIFT}"}
    del floor.attrib["size"]
    return ElementTree.tostring(root, encoding="unicode")


class LearngeneReacherEnv(ReacherEnv, _Simulated):
    """The arm with one of several bodies; see the module.

    Args:
        task: "plain", "heavy", "stiff", "weak"; or "light", which no evolution here sees.

    Raises:
        ValueError: an unknown task.
    """

    def __init__(
        self, task: str = "plain", *, render_mode: str | None = None, width: int = 480, height: int = 270
    ) -> None:
        if task not in ARMS:
            raise ValueError(f"task={task!r} is not one of {list(ARMS)}.")
        camera = {"trackbodyid": 0, "distance": 0.75, "elevation": -60.0, "azimuth": 90.0}
        super().__init__(render_mode=render_mode, width=width, height=height, default_camera_config=camera)
        self.task = task
        mass, damping, strength = ARMS[task]
        self.model.body_mass[:] *= mass
        self.model.body_inertia[:] *= mass
        self.model.dof_damping[:2] *= damping  # the other two move the target, which rests
        self.model.actuator_gear[:, 0] *= strength
        mujoco.mj_setConst(self.model, self.data)

    def step(self, action: NDArray[Any]) -> tuple[NDArray[np.float64], Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated or self.broken(), truncated, info


for _id, _class, _steps in ((ANT, LearngeneAntEnv, 3000), (REACHER, LearngeneReacherEnv, 50)):
    gymnasium.register(_id, entry_point=f"{__name__}:{_class.__name__}", max_episode_steps=_steps)
