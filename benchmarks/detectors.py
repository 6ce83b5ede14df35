"""Online detectors: false alarms by kind of noise, delays and power, on made-up series with known truth.

Prints four tables: alignment sign, period, information plane, plateau. Takes about two minutes on one core.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from _series import ar1, claims, moving_average, square_wave

from entropy_monitor.watcher.detectors.period import PeriodOptions, PeriodState, update_period
from entropy_monitor.watcher.detectors.plane import PlaneOptions, PlanePoint, PlaneState, update_plane
from entropy_monitor.watcher.detectors.plateau import PlateauOptions, PlateauState, update_plateau
from entropy_monitor.watcher.detectors.refine import refine_period
from entropy_monitor.watcher.detectors.sign import SignOptions, SignState, accumulate, update_sign

NUM_SAMPLES = 2000
WINDOW = 32


def signs(series, std_error=1.0):
    state, options, found = SignState(), SignOptions(), []
    for step, value in enumerate(series.tolist()):
        state, conclusion = update_sign(state, step, value, std_error, options)
        found.append(conclusion.sign)
    return np.array(found)


def plain_signs(series):
    """The same recursion on z as stated, without learned noise."""
    upward = downward = 0.0
    sign, options, found = 0, SignOptions(), []
    for index, z in enumerate(series.tolist(), start=1):
        upward, downward = accumulate(upward, downward, z, sign, options)
        if index >= options.min_samples and max(upward, downward) > options.threshold:
            sign, upward, downward = (1 if upward > downward else -1), 0.0, 0.0
        found.append(sign)
    return np.array(found)


def num_false(found, mean):
    """Signs named wrongly: any where the mean is 0, a negative one (and its return) where it is positive."""
    changes = np.flatnonzero(np.diff(found))
    if mean == 0:
        return len(changes)
    return int(np.sum((found[changes + 1] < 0) | (found[changes] < 0)))


def turn_delays(found, truth):
    """Samples from each turn that was preceded by the right sign until the new one is named; NaN when never."""
    delays = []
    turns = np.flatnonzero(np.diff(truth)) + 1
    for begin, end in zip(turns, [*turns[1:], len(truth)], strict=True):
        if found[begin - 1] == truth[begin - 1]:
            named = np.flatnonzero(found[begin:end] == truth[begin])
            delays.append(named[0] + 1 if len(named) else np.nan)
    return delays


def sign_table(rng, num_series):
    print(f"\nSign: false alarms per 1000 samples (n = {num_series} x {NUM_SAMPLES} samples each)")
    print(f"{'noise':34} {'mean':>5} {'as stated':>10} {'learned':>8}")
    for coefficient in (0.0, 0.3, 0.5, 0.7):
        for mean in (0.0, 0.5, 1.0):
            noise = ar1(rng, num_series, NUM_SAMPLES, coefficient) + mean
            rates = [np.mean([num_false(run(row), mean) for row in noise]) / 2 for run in (plain_signs, signs)]
            print(f"AR(1) {coefficient:<28} {mean:5} {rates[0]:10.2f} {rates[1]:8.2f}", flush=True)
    waves = 4 * np.sin(2 * np.pi * np.arange(NUM_SAMPLES) / 5.07)
    others = {
        "white, errors stated half too small": 2 * ar1(rng, num_series, NUM_SAMPLES, 0.0),
        "white, stated a fifth of the truth": 5 * ar1(rng, num_series, NUM_SAMPLES, 0.0),
        "white + oscillation, period 5, 4 SE": ar1(rng, num_series, NUM_SAMPLES, 0.0) + waves,
    }
    for name, noise in others.items():
        rates = [np.mean([num_false(run(row), 0.0) for row in noise]) / 2 for run in (plain_signs, signs)]
        print(f"{name:34} {0.0:5} {rates[0]:10.2f} {rates[1]:8.2f}", flush=True)
    print("Sign: delay after a turn of a square wave, samples: median (90 %), turns missed")
    for period in (200, 40):
        for coefficient in (0.0, 0.5):
            for amplitude in (0.5, 1.0, 2.0):
                truth = square_wave(NUM_SAMPLES, period)
                noise = ar1(rng, 20, NUM_SAMPLES, coefficient) + amplitude * truth
                cells = []
                for run in (plain_signs, signs):
                    delays = np.array([delay for row in noise for delay in turn_delays(run(row), truth)])
                    seen, missed = delays[np.isfinite(delays)], float(np.mean(np.isnan(delays)))
                    quantiles = np.quantile(seen, [0.5, 0.9]) if len(seen) else [np.nan, np.nan]
                    cells.append(f"{quantiles[0]:3.0f} ({quantiles[1]:3.0f}), {missed:4.0%} of {len(delays):3}")
                print(
                    f"period {period:3} AR(1) {coefficient:3} amplitude {amplitude:3} SE:"
                    f"  as stated {cells[0]}   learned {cells[1]}",
                    flush=True,
                )


def period_table(rng, num_series):
    series = ar1(rng, 1, NUM_SAMPLES, 0.3)[0] + np.sin(np.arange(NUM_SAMPLES) / 20)
    state, options = PeriodState(), PeriodOptions()
    one = []
    for index, value in enumerate(series.tolist()):
        state, conclusion = update_period(state, index, value, options)
        one.append(conclusion.is_cycle)
    agrees = bool(np.all(claims(series[None], 1)[0][0] == one))
    print(f"\nPeriod: the bank for many series agrees with update_period: {agrees}")
    time = np.arange(NUM_SAMPLES)
    nulls = {f"AR(1) {rho}": ar1(rng, num_series, NUM_SAMPLES, rho) for rho in (0.0, 0.3, 0.5, 0.9, 0.95)}
    nulls["random walk"] = np.cumsum(rng.standard_normal((num_series, NUM_SAMPLES)), axis=1)
    nulls["white + trend of 20 sd"] = ar1(rng, num_series, NUM_SAMPLES, 0.0) + 20 * time / NUM_SAMPLES
    nulls["white + a jump of 5 sd"] = ar1(rng, num_series, NUM_SAMPLES, 0.0) + 5 * (time > 1000)
    nulls["white + a bump of 5 sd, 200 samples"] = ar1(rng, num_series, NUM_SAMPLES, 0.0) + 5 * (abs(time - 1100) < 100)
    nulls["moving average of 32"] = moving_average(rng, num_series, NUM_SAMPLES, WINDOW)
    print(
        f"Period: whole runs of {NUM_SAMPLES} samples that ever claim a cycle, of {num_series}: every 1, every 10 steps"
    )
    for name, noise in nulls.items():
        print(f"{name:36} {[int(claims(noise, every)[0].any(axis=1).sum()) for every in (1, 10)]}", flush=True)
    print("Period: share of sines found in 2000 samples (40 runs), samples until then, error of the period at the end")
    for coefficient in (0.0, 0.5, 0.9):
        for period in (100, 200, 300):
            cells = []
            for amplitude in (0.3, 0.5, 0.7, 1.0, 2.0):
                waves = amplitude * np.sin(2 * np.pi * (time / period + rng.random((40, 1))))
                found, last = claims(waves + ar1(rng, 40, NUM_SAMPLES, coefficient), 1)
                ever = found.any(axis=1)
                when = f"{np.median(found.argmax(axis=1)[ever]):5.0f}" if ever.any() else "    -"
                error = f"{np.median(abs(last[ever] / period - 1)):4.1%}" if ever.any() else "   -"
                cells.append(f"{amplitude}: {ever.mean():4.0%} {when} {error}")
            print(f"AR(1) {coefficient} period {period}  " + "  ".join(cells), flush=True)
    print("Period: refine_period, sine of amplitude 1 and period 400 steps, 1000 samples every 5 steps, 200 runs")
    steps = 5 * np.arange(1000)
    for coefficient in (0.0, 0.5, 0.8):
        noise = ar1(rng, 200, 1000, coefficient)
        waves = np.sin(2 * np.pi * (steps / 400 + rng.random((200, 1))))
        found = np.array([refine_period(steps, row, near=415.0) for row in noise + waves])
        spread = np.nanstd((found[:, 0] - 400) / found[:, 1])
        print(f"AR(1) {coefficient}: median stated error {np.nanmedian(found[:, 1]):.2f} steps, sd of z {spread:.2f}")


def plane_run(inputs, outputs, std_error):
    state, options, found = PlaneState(), PlaneOptions(), []
    for step, (x, y) in enumerate(zip(inputs.tolist(), outputs.tolist(), strict=True)):
        state, conclusion = update_plane(state, step, PlanePoint(x, std_error, y, std_error), options)
        found.append(conclusion)
    return found


def plane_table(rng, num_series):
    print(
        f"\nPlane: whole runs of {NUM_SAMPLES} samples of a constant plane, windows of {WINDOW}, that ever name a stage"
    )
    for name, std_error in {"errors as they are": 1.0, "stated half too small": 0.5, "not stated": None}.items():
        noise = moving_average(rng, 2 * num_series, NUM_SAMPLES, WINDOW)
        runs = [plane_run(noise[2 * run], noise[2 * run + 1], std_error) for run in range(num_series)]
        stages = [{point.stage for point in run} - {"undetermined"} for run in runs]
        print(f"{name:24} {sum(map(bool, stages))} of {num_series}", flush=True)
    print("Plane: I(X;Z) rises by 20 SE in 400 samples and falls from 1000 on, in 300; 30 runs; samples (5, 50, 95 %)")
    time = np.arange(NUM_SAMPLES)
    for fall in (3, 4, 6, 12):
        x = 20 * np.minimum(time / 400, 1) - fall * np.clip((time - 1000) / 300, 0, 1)
        y = 20 * np.minimum(time / 600, 1)
        noise = moving_average(rng, 60, NUM_SAMPLES, WINDOW)
        runs = [plane_run(x + noise[2 * run], y + noise[2 * run + 1], 1.0) for run in range(30)]
        first = [next((i for i, point in enumerate(run) if point.stage == "compression"), np.nan) for run in runs]
        last = [run[-1] for run in runs if run[-1].stage == "compression"]
        covered = np.mean([point.earliest <= 1000 <= point.latest for point in last]) if last else np.nan
        began = quantiles([point.began for point in last])
        print(
            f"fall of {fall:2} SE: named in {np.mean(np.isfinite(first)):.0%}, median at {np.nanmedian(first):.0f},"
            f" before 1000 in {np.sum(np.array(first) < 1000)}; began {began},"
            f" 1000 within the interval {covered:.0%}",
            flush=True,
        )


def plateau_table(rng, num_series):
    time = np.arange(NUM_SAMPLES)
    shapes = {
        "constant": np.zeros(NUM_SAMPLES),
        "rises by 20 SE until 800, stays": 20 * np.minimum(time / 800, 1),
        "the same, then falls by 10 SE": 20 * np.minimum(time / 800, 1) - 10 * np.maximum(0, (time - 800) / 1200),
        "rises throughout, by 30 SE": 30 * time / NUM_SAMPLES,
    }
    print(f"\nPlateau: {num_series} runs of {NUM_SAMPLES} samples; samples (5, 50, 95 %)")
    for name, shape in shapes.items():
        ends, told = [], []
        for noise in moving_average(rng, num_series, NUM_SAMPLES, WINDOW):
            state, options, stopped = PlateauState(), PlateauOptions(), []
            for step, value in enumerate((shape + noise).tolist()):
                state, conclusion = update_plateau(state, step, value, 1.0, options)
                stopped.append(conclusion.is_stopped)
            ends.append(conclusion)
            told.append(np.flatnonzero(stopped)[0] if any(stopped) else np.nan)
        covered = np.mean([end.earliest <= 800 + WINDOW <= end.latest for end in ends])
        still = np.mean([end.is_stopped for end in ends])
        print(
            f"{name:32} stopped at {quantiles([end.stopped_at for end in ends])}"
            f" best {quantiles([end.best_step for end in ends])} first told {quantiles(told)}"
            f" 832 within the interval {covered:.0%}, stopped at the end {still:.0%}",
            flush=True,
        )


def quantiles(values):
    seen = np.array(values)[np.isfinite(values)]
    return np.round(np.quantile(seen, [0.05, 0.5, 0.95])) if len(seen) else "never"


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.py bench detectors", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    rng = np.random.default_rng(parser.parse_args().seed)
    sign_table(rng, 100)
    period_table(rng, 1000)
    plane_table(rng, 200)
    plateau_table(rng, 40)
    return 0


if __name__ == "__main__":
    sys.exit(main())
