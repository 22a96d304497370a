"""Slices of the loss against closed forms, and the pictures of them."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiers

from optax_sam import landscape

_RNG = np.random.default_rng(0)
ONES = jnp.ones(6)
PARAMS = {
    "first": {"kernel": jnp.asarray(_RNG.normal(size=(5, 8)), jnp.float32), "bias": jnp.full(8, 0.1)},
    "second": {"kernel": jnp.asarray(_RNG.normal(size=(8, 3)), jnp.float32)},
}
IMAGES = jnp.asarray(_RNG.normal(size=(12, 5)), jnp.float32)
X = np.linspace(-1.0, 1.0, 9)
BOWL = landscape.Plane(X, X, 5 * X[:, None] ** 2 + X**2)


def relu_loss(params: Any, batch: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(batch @ params["first"]["kernel"] + params["first"]["bias"])
    return jnp.mean((hidden @ params["second"]["kernel"]) ** 2)


def bowl(w: jax.Array, batch: jax.Array) -> jax.Array:
    return jnp.mean(batch) * (10 * w[0] ** 2 + w[1] ** 2) / 2


class TestRandomDirection:
    def test_filters_are_as_long_as_those_of_the_params(self) -> None:
        params = {**PARAMS, "conv": jnp.asarray(_RNG.normal(size=(3, 3, 2, 4)), jnp.float32)}
        direction = landscape.random_direction(params, key=1)
        for d, w in (
            (direction["conv"], params["conv"]),
            (direction["second"]["kernel"], params["second"]["kernel"]),
        ):
            lengths = [np.linalg.norm(np.reshape(x, (-1, x.shape[-1])), axis=0) for x in (d, w)]
            np.testing.assert_allclose(*lengths, rtol=1e-5)
        assert not np.any(direction["first"]["bias"])
        other = landscape.random_direction(params, key=2)
        assert not np.allclose(other["conv"], direction["conv"])

    def test_filters_of_zeros_stay(self) -> None:
        direction = landscape.random_direction({"kernel": jnp.zeros((3, 2))})
        np.testing.assert_array_equal(direction["kernel"], 0.0)

    def test_a_rescaling_of_layers_does_not_show(self) -> None:
        rescaled = {
            "first": jax.tree.map(lambda w: 8.0 * w, PARAMS["first"]),
            "second": jax.tree.map(lambda w: w / 8.0, PARAMS["second"]),
        }
        planes = [landscape.plane(relu_loss, p, IMAGES, x=X, key=3).losses for p in (PARAMS, rescaled)]
        np.testing.assert_allclose(*planes, rtol=1e-4)
        # A direction that is not normalized depends on the scale of the layers.
        plain = jax.tree.map(jnp.ones_like, PARAMS)
        lines = [landscape.line(relu_loss, p, IMAGES, plain, positions=X).losses for p in (PARAMS, rescaled)]
        assert not np.allclose(*lines, rtol=0.1)


class TestSlices:
    @pytest.mark.parametrize("chunk_size", tiers.later([1, 4, 7, 100], [7]))
    def test_paraboloid(self, chunk_size: int) -> None:
        w, d = jnp.array([0.3, -0.2]), (jnp.array([1.0, 1.0]), jnp.array([0.0, 2.0]))
        y = np.linspace(-2.0, 0.5, 5)
        result = landscape.plane(bowl, w, ONES, d, x=X, y=y, chunk_size=chunk_size)
        s, t = np.meshgrid(X, y, indexing="ij")
        exact = (10 * (0.3 + s) ** 2 + (-0.2 + s + 2 * t) ** 2) / 2
        np.testing.assert_allclose(result.losses, exact, rtol=1e-4, atol=1e-6)
        line = landscape.line(bowl, w, ONES, d[0], positions=X, chunk_size=chunk_size)
        np.testing.assert_allclose(
            line.losses, (10 * (0.3 + X) ** 2 + (X - 0.2) ** 2) / 2, rtol=1e-4, atol=1e-6
        )

    def test_along_eigenvectors(self) -> None:
        directions = landscape.eigenvector_directions(bowl, jnp.zeros(2), ONES, k=2)
        result = landscape.plane(bowl, jnp.zeros(2), ONES, directions, x=X)
        np.testing.assert_allclose(result.losses, (10 * X[:, None] ** 2 + X**2) / 2, rtol=1e-4, atol=1e-6)

    def test_between(self) -> None:
        start, end = jnp.array([1.0, 0.0]), jnp.array([0.0, 3.0])
        result = landscape.between(bowl, start, end, ONES, positions=[0.0, 0.5, 1.0, 2.0])
        np.testing.assert_allclose(result.losses, [5.0, 2.375, 4.5, 23.0], rtol=1e-5)

    def test_streaming_equals_the_full_batch(self) -> None:
        direction = landscape.random_direction(PARAMS)
        whole = landscape.line(relu_loss, PARAMS, IMAGES, direction).losses
        for batches in ([IMAGES[:5], IMAGES[5:10], IMAGES[10:]], iter([IMAGES[:8], IMAGES[8:]])):
            streamed = landscape.line(relu_loss, PARAMS, batches, direction).losses
            np.testing.assert_allclose(streamed, whole, rtol=1e-5)

    def test_traced_once(self) -> None:
        traces: list[int] = []

        def counted(w: jax.Array, batch: jax.Array) -> jax.Array:
            traces.append(1)
            return bowl(w, batch)

        for _ in range(2):  # Twice 81 points in chunks of 16, on three batches.
            landscape.plane(counted, jnp.zeros(2), [ONES] * 3, (jnp.ones(2), jnp.ones(2)), x=X)
            assert len(traces) == 1

    def test_far_out_the_loss_may_overflow(self) -> None:
        result = landscape.line(
            lambda w, b: jnp.mean(b) * jnp.exp(w[0] ** 2), jnp.zeros(2), ONES, jnp.ones(2), positions=[0, 1e3]
        )
        assert result.losses[0] == 1.0
        assert np.isinf(result.losses[1])

    @pytest.mark.parametrize("batches", [[100.0, 1.0], [1.0, 100.0], [100.0, 100.0]])
    def test_batches_that_overflow_give_what_their_union_gives(self, batches: list[float]) -> None:
        def loss(w: jax.Array, batch: jax.Array) -> jax.Array:
            return jnp.mean(jnp.exp(w * batch))

        for data in ([jnp.array([x]) for x in batches], jnp.array(batches)):
            result = landscape.line(loss, jnp.array(0.0), data, jnp.array(1.0), positions=[0.0, 1.0])
            np.testing.assert_array_equal(result.losses, [1.0, np.inf])

    def test_progress(self, capsys: pytest.CaptureFixture[str]) -> None:
        landscape.line(bowl, jnp.zeros(2), [ONES, ONES], jnp.ones(2), positions=X, progress=True)
        assert "2/2" in capsys.readouterr().err

    def test_bad_input(self) -> None:
        w = jnp.zeros(2)
        with pytest.raises(ValueError, match="`batches` must hold at least one batch"):
            landscape.line(bowl, w, [], w)
        with pytest.raises(ValueError, match="`loss_fn` must return a scalar"):
            landscape.line(lambda w, b: w * b[0], w, ONES, w)
        with pytest.raises(ValueError, match="The loss must be finite at params, got nan"):
            landscape.line(bowl, w * jnp.nan, ONES, w)
        with pytest.raises(ValueError, match="direction 0 must have the shapes of params"):
            landscape.line(bowl, w, ONES, jnp.ones(3))
        with pytest.raises(ValueError, match="`positions` must be a sequence of one or more finite numbers"):
            landscape.line(bowl, w, ONES, w, positions=[])
        with pytest.raises(ValueError, match="`directions` must be two pytrees like params, got 1"):
            landscape.plane(bowl, w, ONES, [w])
        with pytest.raises(ValueError, match=r"`chunk_size` .*got 0"):
            landscape.line(bowl, w, ONES, w, chunk_size=0)
        with pytest.raises(ValueError, match="`end` must have the shapes of params"):
            landscape.between(bowl, w, jnp.zeros(3), ONES)
        with pytest.raises(ValueError, match="`end` must have the structure of params") as caught:
            landscape.between(bowl, {"a": w}, {"b": w}, ONES)
        assert "optax" not in str(caught.value)  # The message does not mention updates.
        with pytest.raises(ValueError, match=r"`k` .*\[1, 2\], got 3"):
            landscape.eigenvector_directions(bowl, w, ONES, k=3)


class TestTrajectory:
    def test_a_path_in_a_plane_comes_back(self) -> None:
        a, b = np.linalg.qr(_RNG.normal(size=(64, 2)))[0].T
        t = np.linspace(0.0, 1.0, 12)
        plane = np.stack([10 * (1 - t), np.sin(6 * t) - np.sin(6.0)], axis=1)
        points = 1.0 + plane @ np.stack([a, b])

        def as_params(flat: np.ndarray) -> Any:
            return {"w": jnp.asarray(flat[:40].reshape(8, 5), jnp.float32), "v": jnp.asarray(flat[40:])}

        path = landscape.trajectory(as_params(p) for p in points)
        np.testing.assert_allclose(path.explained.sum(), 1.0, rtol=1e-6)
        assert path.explained[0] > path.explained[1]
        np.testing.assert_allclose(
            np.linalg.norm(path.coordinates, axis=1), np.linalg.norm(plane, axis=1), atol=1e-4
        )
        # The coordinates along the directions lead from the last params to every checkpoint.
        for point, (x, y) in zip(points, path.coordinates, strict=True):
            there = jax.tree.map(
                lambda w, d, e, x=x, y=y: w + x * d + y * e, as_params(points[-1]), *path.directions
            )
            jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, atol=1e-4), there, as_params(point))

    def test_bad_input(self) -> None:
        w = jnp.ones(3)
        with pytest.raises(ValueError, match="`checkpoints` must hold three params or more, got 2"):
            landscape.trajectory([w, w])
        with pytest.raises(ValueError, match="`checkpoints` must span a plane"):
            landscape.trajectory([3 * w, 2 * w, w])
        with pytest.raises(ValueError, match=r"`checkpoints\[1\]` must have the shapes of params"):
            landscape.trajectory([w, jnp.ones(2), w])
        with pytest.raises(ValueError, match="`checkpoints` must be finite"):
            landscape.trajectory([w, w * jnp.nan, w])


class TestPictures:
    def test_lines(self) -> None:
        axes = landscape.plot_line(landscape.Line(X, X**2))
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), X**2)
        axes = landscape.plot_line({"a": landscape.Line(X, X**2), "b": landscape.Line(X, 1 + X**2)}, log=True)
        assert len(axes.lines) == 2
        assert axes.get_yscale() == "log"

    def test_contours(self, tmp_path: Any) -> None:
        checkpoints = [jnp.array([4.0, 0.0]), jnp.array([1.0, 1.0]), jnp.array([0.0, 0.0])]
        path = landscape.trajectory(checkpoints)
        axes = landscape.plot_contour(BOWL, path=path)
        np.testing.assert_allclose(np.stack(axes.lines[0].get_data(), 1), path.coordinates)
        axes.figure.savefig(tmp_path / "plane.png")
        assert (tmp_path / "plane.png").stat().st_size > 1000
        # Losses that overflow or are negative also have contours.
        for losses in (np.where(BOWL.losses > 3, np.nan, BOWL.losses), BOWL.losses - 10):
            landscape.plot_contour(BOWL._replace(losses=losses), levels=5, colorbar=False).figure.savefig(
                tmp_path / "plane.png"
            )

    @pytest.mark.parametrize("log", [True, False])
    @pytest.mark.parametrize("level", tiers.later([0.0, 2.0, -3.0, 1e-8], [0.0, 2.0]))
    def test_contours_of_a_plane_that_is_flat(self, level: float, log: bool, tmp_path: Any) -> None:
        losses = np.full(BOWL.losses.shape, level, np.float32)  # As `plane` returns them.
        axes = landscape.plot_contour(BOWL._replace(losses=losses), log=log)
        axes.figure.savefig(tmp_path / "plane.png")

    def test_contours_need_a_finite_loss(self) -> None:
        with pytest.raises(ValueError, match=r"`result` must hold a finite loss to draw"):
            landscape.plot_contour(BOWL._replace(losses=np.full_like(BOWL.losses, np.inf)))

    def test_how_many_contours(self) -> None:
        landscape.plot_contour(BOWL, levels=np.int64(5))
        for levels in (0, 1):
            with pytest.raises(ValueError, match=rf"`levels` must be an integer in the .*got {levels}"):
                landscape.plot_contour(BOWL, levels=levels)
        with pytest.raises(ValueError, match=r"`levels` must be two increasing numbers or more.*got \[0.5\]"):
            landscape.plot_contour(BOWL, levels=[0.5])

    def test_surface(self, tmp_path: Any) -> None:
        for largest in (None, 2.0):
            axes = landscape.plot_surface(BOWL, largest=largest)
            axes.figure.savefig(tmp_path / "surface.png")
        assert axes.get_zlim() == (0.0, 2.0)
        with pytest.raises(ValueError, match=r"`largest` .*got 0"):
            landscape.plot_surface(BOWL, largest=0)

    def test_without_matplotlib(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match=r"needs matplotlib.*`pip install optax-sam\[sharpness\]`"):
            landscape.plot_contour(BOWL)
