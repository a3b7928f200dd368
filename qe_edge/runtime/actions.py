"""Engines of models that act: pictures, a task and a robot's state in, actions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qe_edge.models.family import Encoded, ModelFamily, Sample
from qe_edge.models.robot import RobotProcessor, times
from qe_edge.runtime.backends import check_runnable, open_sessions
from qe_edge.runtime.embedding import TokenEmbedding
from qe_edge.runtime.engine import family_of_engines
from qe_edge.runtime.engine_info import read_engine_info
from qe_edge.runtime.generation import check_finite
from qe_edge.runtime.manifest import ActionManifest, read_action_manifest
from qe_edge.runtime.sampling import check_count
from qe_edge.runtime.sessions import ACCURACY_LEVELS, Session
from qe_edge.system.errors import InputError

PICTURES = 4  # that the visual encoder sees at a time
MAX_STEPS = 1000


def noise_of(shape: tuple[int, int], seeds: Sequence[int]) -> np.ndarray:
    """What actions are made of, the same for a seed on every machine.

    Args:
        shape: Actions of a chunk, and numbers of an action.
        seeds: One for each row.

    Returns:
        float32 `[seeds, chunk, numbers]`.

    Example:
        >>> one, both = noise_of((50, 32), [7]), noise_of((50, 32), [3, 7])
        >>> both.shape, np.array_equal(one[0], both[1])
        ((2, 50, 32), True)
    """
    return np.stack([np.random.default_rng(seed).standard_normal(shape, np.float32) for seed in seeds])


def check_steps(steps: int | None, usual: int) -> int:
    """The number of steps of denoising: the model's own where none is asked for.

    Raises:
        InputError: If there cannot be so many.

    Example:
        >>> check_steps(None, 10), check_steps(5, 10)
        (10, 5)
    """
    found = usual if steps is None else steps
    check_count("steps", found, 1)
    if found > MAX_STEPS:
        raise InputError(f"{found} steps are too many.", f"Choose at most {MAX_STEPS}.")
    return found


class ActionEngine:
    """A vision-language-action model in ONNX Runtime or TensorRT; `load` opens a folder.

    Attributes:
        manifest: The folder's manifest.
        family: The model's family.
        processor: Tokenizer, image processor and the robot's statistics.

    Example:
        engine = ActionEngine.load("engines")
        (actions,) = engine.act([Sample(["front.png", "wrist.png"], "pick up the cup", state=[0.1, 0.7])], seed=0)
    """

    def __init__(
        self,
        manifest: ActionManifest,
        family: ModelFamily,
        processor: RobotProcessor,
        embedding: TokenEmbedding,
        sessions: Mapping[str, Session],
        *,
        sized: bool = False,
    ) -> None:
        self.manifest = manifest
        self.family = family
        self.processor = processor
        self._embedding = embedding
        self._sessions = sessions
        self._sized = sized

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        accuracy_level: int = 0,
        threads: int | None = None,
        plugin_library: Path | None = None,
    ) -> ActionEngine:
        """Open an ONNX folder (`qe-edge export`) or an engine folder (`qe-edge build`) of a model that makes actions.

        Args:
            folder: The folder.
            accuracy_level: For ONNX Runtime: 0 is exact, 4 is faster and rounds activations of INT4 products.
            threads: For ONNX Runtime: number of threads, None for all cores.
            plugin_library: For engines with the plugin: its library, None for the one that is found.

        Raises:
            InputError: If there is no such accuracy level.
            ArtifactError: If the folder is missing or damaged, or holds a model of another kind.
            TargetError: If this machine cannot run its engines.
        """
        folder = Path(folder)
        if accuracy_level not in ACCURACY_LEVELS:
            raise InputError(f"There is no accuracy level {accuracy_level}.", "Choose 0 (exact) or 4 (faster).")
        info = read_engine_info(folder)
        check_runnable(folder, plugin_library)
        manifest = read_action_manifest(folder)
        if info is not None:
            info.check_belongs(manifest, folder)
        family = family_of_engines(folder, manifest.model_type)
        processor = family.load_processor(str(folder))
        embedding = TokenEmbedding(folder, manifest.vocab_size, manifest.hidden_size)
        sessions = open_sessions(folder, manifest.graphs, info, threads, plugin_library, accuracy_level)
        return cls(manifest, family, processor, embedding, sessions, sized=info is not None and info.sized)

    @property
    def chunk(self) -> tuple[int, int]:
        """Actions that are made at once, and numbers of an action in the model."""
        _, actions, numbers = self.manifest.graphs["action"].inputs[1].shape
        return int(actions), int(numbers)

    def encode(self, samples: Sequence[Sample]) -> Encoded:
        """Pixels, tokens and normalized states of a batch.

        Raises:
            InputError: If there is no sample, or one lacks a picture or a state.
        """
        if not samples:
            raise InputError("There is nothing to do.", "Pass at least one sample with pictures, a task and a state.")
        return self.family.encode(self.processor, samples)

    def act(self, samples: Sequence[Sample], *, seed: int = 0, steps: int | None = None) -> np.ndarray:
        """Actions in the robot's own numbers, float32 `[samples, chunk, numbers]`.

        Args:
            samples: Pictures, task and state of each.
            seed: Of the noise; sample number i has the noise of `seed + i`.
            steps: Steps of denoising; None for the model's own number.

        Raises:
            InputError: If a sample cannot be used, or there is no such number of steps.
            NumericalError: If the actions are not finite.
        """
        check_count("seed", seed, 0)
        check_steps(steps, self.family.config.num_inference_steps)
        encoded = self.encode(samples)
        noise = noise_of(self.chunk, range(seed, seed + len(samples)))
        return self.processor.actions.restored(self.actions(encoded, noise, steps))

    def actions(self, encoded: Encoded, noise: np.ndarray, steps: int | None = None) -> np.ndarray:
        """Normalized actions float32 `[batch, chunk, width]`, as transformers' `sample_actions` returns them.

        Args:
            encoded: The batch.
            noise: float32 `[batch, chunk, width]`.
            steps: Steps of denoising; None for the model's own number.

        Raises:
            InputError: If the noise has another shape, there is no such number of steps, or the batch is larger than
                the engines take.
            NumericalError: If the actions are not finite.
        """
        count = check_steps(steps, self.family.config.num_inference_steps)
        wanted = (len(encoded.input_ids), *self.chunk)
        if noise.shape != wanted:
            raise InputError(f"The noise has the shape {list(noise.shape)}.", f"Give numbers of shape {list(wanted)}.")
        self._check_size(encoded)
        mask = encoded.attention_mask
        fixed = {"state": encoded.pixels["state"], "attention_mask": mask, **self._prefix(encoded)}
        actions = noise.astype(np.float32)
        change = np.float32(-1.0 / count)
        for time in times(count):
            feeds = {**fixed, "actions": actions, "time": np.full(len(mask), time, np.float32)}
            (velocity,) = self._sessions["action"].run(feeds).values()
            actions = actions + change * np.asarray(velocity, np.float32)
        check_finite(actions, "The actions of the engine")
        return actions

    def features(self, encoded: Encoded) -> np.ndarray:
        """Image features `[features, width]` of a batch, in the order of its image tokens."""
        (feeds,) = self.family.visual_feeds(encoded)
        pixels = feeds["pixel_values"]
        name = self.manifest.graphs["merger"].inputs[0].name
        found = []
        for start in range(0, len(pixels), PICTURES):
            (hidden,) = self._sessions["visual"].run({"pixel_values": pixels[start : start + PICTURES]}).values()
            (part,) = self._sessions["merger"].run({name: hidden}).values()
            found.append(np.asarray(part, np.float32))
        return np.concatenate(found)

    def _prefix(self, encoded: Encoded) -> dict[str, np.ndarray]:
        """Keys and values of the prompts, as the graph "action" reads them."""
        # a picture's token may lie outside the vocabulary
        embeds = self._embedding(np.where(encoded.image_mask, 0, encoded.input_ids))
        embeds[encoded.image_mask] = self.features(encoded)
        kept = self._sessions["prefix"].run(
            {
                "inputs_embeds": embeds,
                "position_ids": self.family.position_ids(encoded),
                "attention_mask": encoded.attention_mask,
            }
        )
        return {name.replace("present.", "past_key_values.", 1): np.asarray(part) for name, part in kept.items()}

    def _check_size(self, encoded: Encoded) -> None:
        """Refuse a batch that engines of fixed sizes do not take."""
        if not self._sized:
            return
        rows, prompt = self.manifest.graphs["prefix"].profiles["default"]["attention_mask"][2]
        found = encoded.input_ids.shape
        if found[0] > rows or found[1] > prompt:
            asked = f"{found[0]} samples of {found[1]} tokens"
            raise InputError(
                f"This engine does not take {asked}: it was built for {rows} of {prompt}.",
                "Use fewer samples at a time, fewer cameras or a shorter task.",
            )
