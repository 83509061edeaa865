"""Keys, allow-lists, addresses: who may talk to whom."""

import os
import stat

import pytest
import zmq.utils.z85
from answers import equal_local, rows
from typer.testing import CliRunner

import fastee
from fastee.cli import app
from fastee.cluster.client import Client
from fastee.cluster.endpoint import Identity, check_address, open_endpoint
from fastee.cluster.keys import Keys, load_allowed, load_keys, make_keys, raw_key, save_keys
from fastee.errors import ClusterError

pytestmark = [pytest.mark.timeout(60), pytest.mark.skipif(os.environ.get("FASTEE_TRANSPORT") == "python", reason="the Python transport has no CURVE")]


def test_raw_keys_are_those_of_zeromq():
    for _ in range(20):
        keys = make_keys()
        assert raw_key(keys.public) == zmq.utils.z85.decode(keys.public.encode()) and keys.public != keys.secret
        assert keys.secret not in repr(keys)
    for wrong in ("", "x" * 39, "x" * 41, "~" * 40, "#" * 40):
        with pytest.raises(ValueError, match="key: "):
            raw_key(wrong)


def test_a_key_file_is_private_and_never_replaced(tmp_path):
    path = tmp_path / "edge.toml"
    result = CliRunner().invoke(app, ["keys", str(path)])
    keys = load_keys(path)
    assert result.exit_code == 0 and result.stdout.strip() == f'"edge" = "{keys.public}"' and keys.secret not in result.stdout
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        save_keys(keys, path)
    assert load_keys(path) == keys
    path.chmod(0o640)
    with pytest.raises(ClusterError, match="mode is 640; run `chmod 600`"):
        load_keys(path)
    path.chmod(0o600)
    path.write_text('public = "short"\nsecret = "short"\n')
    with pytest.raises(ClusterError, match="holds no keys: key: expected 40 characters"):
        load_keys(path)
    (tmp_path / "allowed.toml").write_text(result.stdout)
    assert load_allowed(tmp_path / "allowed.toml") == {keys.public: "edge"}
    (tmp_path / "allowed.toml").write_text("edge = 5")
    with pytest.raises(ClusterError, match="no allow-list"):
        load_allowed(tmp_path / "allowed.toml")


def test_addresses_beyond_loopback_need_keys():
    keys = Keys("p" * 40, "s" * 40)
    assert check_address("127.0.0.1", None) and check_address("::1", None) and check_address("10.0.0.1", keys)
    with pytest.raises(ClusterError, match="make some with `fastee keys`"):
        check_address("10.0.0.1", None)
    for every in ("0.0.0.0", "::"):
        with pytest.raises(ClusterError, match="name the one to use"):
            check_address(every, keys)
    with pytest.raises(ClusterError, match="must be an IP address"):
        check_address("*", keys)
    end = open_endpoint(Identity("c:1", 0, 1, bytes(16), b"{}"))
    try:
        with pytest.raises(ClusterError, match="not a loopback address"):
            end.bind("10.0.0.1")
    finally:
        end.close()


def test_a_secure_cluster_answers_and_admits_listed_keys_only(net):
    with fastee.local_cluster(net, nodes=2, link=None, secure=True, timeout=15) as cluster:
        x = rows(12)
        assert equal_local(cluster(x, plan=[0, 1, 1], codec="raw"), net, x)
        inside = cluster._client
        for keys, public in ((make_keys(), inside._public), (inside._keys, [make_keys().public] * 2), (None, ())):
            stranger = Client(("mobile", "edge"), inside._ports, inside._fingerprint, {}, credit=8, grace=0.2, timeout=5.0, keys=keys, public=public)
            try:
                late = stranger.wait_ready(1.0)
                assert len(late) == 2 and not any(node.connected for node in stranger.nodes)
                assert keys is None or any("no connection to node" in node.refusal for node in late)
            finally:
                stranger.close()
        assert equal_local(cluster(x, plan=[1, 0, 1], codec="raw"), net, x)
