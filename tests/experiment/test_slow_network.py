"""Hosts with slow links, and the trainings of both experiments on them."""

import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from rlib.experiment import Run, UsageError, slow_network
from rlib.experiment.config import load
from rlib.experiment.environment import CHECKOUT
from rlib.experiment.hosts import slow_hosts
from rlib.nn import Transformer


def test_no_right_to_make_namespaces_is_one_line(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda tool: f"/sbin/{tool}")
    with pytest.raises(UsageError, match="root"), slow_hosts(2, 100):
        pass
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(UsageError, match="iproute2"), slow_hosts(2, 100):
        pass


def needs_hosts():
    try:
        with slow_hosts(1, 100):
            pass
    except UsageError:
        pytest.skip("needs the right to make network namespaces")


def test_hosts_can_be_made_again_at_once_and_leave_nothing():
    needs_hosts()
    for _ in range(3):
        with slow_hosts(2, 100) as hosts:
            command = hosts[0].command("cat", "/sys/class/net/eth0/statistics/tx_bytes")
            assert int(subprocess.run(command, capture_output=True, text=True).stdout) >= 0
    left = subprocess.run(["ip", "link"], capture_output=True, text=True).stdout
    assert f"rl{os.getpid()}" not in left


def test_a_message_of_an_experiment_takes_its_time_on_the_link():
    needs_hosts()
    size, megabits = 179_000, 50  # EControl's payload
    receive = f"""
import socket
server = socket.create_server(("10.77.0.1", 5000))
print("up", flush=True)
peer, _ = server.accept()
left = {size}
while left:
    left -= len(peer.recv(1 << 16))
peer.send(b"x")
"""
    send = f"""
import socket, time
peer = socket.create_connection(("10.77.0.1", 5000))
begun = time.perf_counter()
peer.sendall(bytes({size}))
peer.recv(1)
print(time.perf_counter() - begun)
"""
    with slow_hosts(2, megabits) as (one, other):
        server = subprocess.Popen(
            one.command(sys.executable, "-c", receive), stdout=subprocess.PIPE, text=True
        )
        assert server.stdout.readline() == "up\n"
        client = subprocess.run(
            other.command(sys.executable, "-c", send), capture_output=True, text=True, timeout=30
        )
        server.wait(10)
    assert float(client.stdout) > 0.8 * size * 8 / (megabits * 1e6)


def measured(experiment, **options):
    config, *_ = load(f"configs/{experiment}.py:slow_network", [], CHECKOUT)
    network = config.network.unlock()
    network.update({"megabits": (500.0,), "repeats": 2, "steps": 6, **options})
    build = f"experiments.{experiment}:network_trainings"
    return slow_network.measured(Run(), build, network)


def test_onebit_adam_sends_its_bytes_over_tcp_and_starts_as_adam():
    needs_hosts()
    links = measured("onebit_adam", layers=1, embed=64, heads=2, length=16, warmup=0.5)
    found = links[500.0]
    make = lambda: nnx.state(
        Transformer(256, layers=1, embed=64, heads=2, rngs=nnx.Rngs(0)), nnx.Param
    )
    size = sum(x.size for x in jax.tree.leaves(nnx.eval_shape(make)))
    for name, least, most in (("float32", 4, 5), ("bfloat16", 2, 2.6), ("compressed", 1 / 8, 0.4)):
        sent = slow_network.per_step(found, name, "bytes")
        assert ((least * size < sent) & (sent < most * size)).all(), (name, sent)
    adam, onebit = (found[n]["loss"] for n in ("adam", "1-bit adam"))
    assert adam.shape == onebit.shape == (2, 6)
    np.testing.assert_allclose(adam[:, 0], onebit[:, 0], rtol=1e-3)
    np.testing.assert_array_equal(onebit[0], onebit[1])  # repetitions differ in time alone
    rows = slow_network.network_rows(links)
    assert {row.method for row in rows} == {"float32", "bfloat16", "compressed", *found}
    claim = slow_network.step_claim("x", found, "bytes", "float32", "compressed", at_least=10)
    assert claim.verdict == "held"


def test_econtrol_sends_k_indices_and_values_over_tcp():
    needs_hosts()
    links = measured("econtrol", hidden=(256, 64), fraction=0.05)
    size = 64 * 256 + 256 * 64 + 64 * 10 + 256 + 64 + 10
    found = links[500.0]
    sent = slow_network.per_step(found, "Top-K", "bytes")
    payload = 0.05 * size * 6  # an index of two bytes and a value of four
    assert ((payload < sent) & (sent < 1.3 * payload)).all()
    first = found["econtrol"]["bytes"][:, 0]
    assert (first > 4 * size).all()
    np.testing.assert_allclose(found["sgd"]["loss"][:, 0], found["ef21"]["loss"][:, 0], rtol=1e-6)
