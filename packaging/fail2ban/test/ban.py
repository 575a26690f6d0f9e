"""Runs a fail2ban with the action cwkill in a lab: an attacker and a bystander are connected to a server through a router.

A line in a log bans the attacker. Its connections must end at both ends, and those of the bystander must live. It runs in its own mount
and network namespaces, which scripts/test-fail2ban makes.
"""

import concurrent.futures
import ctypes
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

CWKILL, WORK = os.path.abspath(sys.argv[1]), sys.argv[2]
HERE = os.path.dirname(os.path.abspath(__file__))
PORT = 22
PATIENCE = 60
# Each network has the router as .1 and a host as .2.
NETWORKS = {"attacker": 1, "bystander": 2, "server": 3}
LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNET = 0x40000000


def address(family, network, host):
    return f"10.67.{network}.{host}" if family == 4 else f"fd67:0:0:{network}::{host}"


def sh(line, netns=None):
    inside = ["ip", "netns", "exec", netns] if netns else []
    return subprocess.run([*inside, "sh", "-ec", line], check=True, text=True, stdout=subprocess.PIPE).stdout


def inside(netns, work):
    """Runs `work` on a thread in a network namespace. Its sockets stay there."""

    def run():
        with open(f"/run/netns/{netns}") as file:
            if LIBC.setns(file.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        return work()

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def wait(what, holds):
    until = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > until:
            sys.exit(f"FAILED: {what}\n{fail2ban_log()}")
        time.sleep(0.05)


def fail2ban_log():
    try:
        with open(f"{WORK}/fail2ban.log") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def build():
    sh("ip link set lo up; mkdir -p /run/netns")
    for name in ["router", *NETWORKS]:
        sh(f"ip netns add {name}; ip -n {name} link set lo up")
    sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1", "router")
    for name, network in NETWORKS.items():
        sh(f"ip -n router link add {name} type veth peer name eth0 netns {name}")
        for netns, link, host in [("router", name, 1), (name, "eth0", 2)]:
            sh(f"ip -n {netns} address add {address(4, network, host)}/24 dev {link}")
            sh(f"ip -n {netns} address add {address(6, network, host)}/64 dev {link} nodad")
            sh(f"ip -n {netns} link set {link} up")
        for family in [4, 6]:
            sh(f"ip -n {name} -{family} route add default via {address(family, network, 1)}")


def serve(netns):
    """An echo server of both families."""
    listener = inside(netns, lambda: socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True))

    def echo(connection):
        try:
            while data := connection.recv(4096):
                connection.sendall(data)
        except OSError:
            pass
        # The socket stays open: only cwkill ends it.
        connections.append(connection)

    def accept():
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=echo, args=(connection,), daemon=True).start()

    connections = []
    threading.Thread(target=accept, daemon=True).start()


def connect(netns, to):
    return inside(netns, lambda: socket.create_connection((to, PORT), timeout=PATIENCE))


def works(connection):
    connection.sendall(b"ping")
    return connection.recv(4096) == b"ping"


def seen(netns, ends):
    """How many of these connections ss shows there: pairs of an address and a port of the client."""
    rows = sh("ss -Htn state connected exclude time-wait", netns)
    words = rows.replace("[", "").replace("]", "").split()
    return sum(any(word.endswith(f"{host}:{port}") for word in words) for host, port in ends)


def start_fail2ban(netns, where, hook):
    conf = f"{WORK}/conf"
    shutil.rmtree(conf, ignore_errors=True)
    os.makedirs(f"{conf}/action.d")
    os.makedirs(f"{conf}/filter.d")
    shutil.copy("/etc/fail2ban/fail2ban.conf", conf)
    for file in os.listdir("/etc/fail2ban/action.d"):
        if file.startswith("nftables"):
            shutil.copy(f"/etc/fail2ban/action.d/{file}", f"{conf}/action.d")
    shutil.copy(f"{HERE}/../cwkill.conf", f"{conf}/action.d")
    with open(f"{conf}/filter.d/lab.conf", "w") as file:
        file.write("[Definition]\nfailregex = login failed from <HOST>$\n")
    with open(f"{conf}/jail.conf", "w") as file:
        file.write(
            f"[lab]\nenabled = true\nfilter = lab\nbackend = polling\nlogpath = {WORK}/log\nmaxretry = 1\nfindtime = 600\n"
            f"bantime = 600\naction = nftables[name=lab, type=allports, chain_hook={hook}]\n"
            f"         cwkill[where={where}, cwkill={CWKILL}]\n"
        )
    open(f"{WORK}/log", "w").close()
    open(f"{WORK}/fail2ban.log", "w").close()
    files = f"-c {conf} -s {WORK}/sock -p {WORK}/pid --logtarget {WORK}/fail2ban.log --loglevel INFO"
    with open(f"{conf}/fail2ban.local", "w") as file:
        file.write("[Definition]\ndbfile = None\nallowipv6 = auto\n")
    line = ["ip", "netns", "exec", netns, "fail2ban-server", "-f", *files.split()]
    server = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    wait("fail2ban does not start", lambda: "Jail 'lab' started" in fail2ban_log())
    return server


def failed_login(host):
    with open(f"{WORK}/log", "a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} login failed from {host}\n")


def phase(name, where, netns, hook):
    """`netns` is where fail2ban runs, and `hook` is the hook of its ban there."""
    server = start_fail2ban(netns, where, hook)
    for family in [4, 6]:
        to = address(family, NETWORKS["server"], 2)
        attacks = [connect("attacker", to), connect("attacker", to)]
        if where == "both":
            # One that ends on the router itself.
            attacks.append(connect("attacker", address(family, NETWORKS["attacker"], 1)))
        others = [connect("bystander", to)]
        for connection in attacks + others:
            assert works(connection)
        attacker = address(family, NETWORKS["attacker"], 2)
        ends = [connection.getsockname()[:2] for connection in attacks]
        # The router may have given them another address.
        at_server = [("", port) for _, port in ends]
        assert seen("attacker", ends) == len(attacks)
        assert seen("server", at_server) == 2
        # An address without connections first. It must be no failure.
        failed_login(address(family, NETWORKS["attacker"], 77))
        failed_login(attacker)
        wait("a connection is left at the attacker", lambda: seen("attacker", ends) == 0)
        wait("a connection is left at the server", lambda: seen("server", at_server) == 0)
        if where == "both":
            wait("a connection is left at the router", lambda: seen("router", at_server) == 0)
        for connection in attacks:
            try:
                connection.sendall(b"x")
                assert connection.recv(1) == b""
            except OSError:
                pass
        for connection in others:
            assert works(connection), "the connection of the bystander is lost"
        try:
            connect("attacker", to)
            sys.exit("FAILED: the attacker can connect again")
        except OSError:
            pass
        wait("no ban in the log", lambda: f"Ban {attacker}" in fail2ban_log())
    server.terminate()
    server.wait()
    log = fail2ban_log()
    if "ERROR" in log or "Failed to" in log:
        sys.exit(f"FAILED: an action has failed\n{log}")
    print(f"{name}: the connections of a banned address end at both ends, those of a bystander live, of both families")


build()
serve("server")
serve("router")
phase("on a host", "host", "server", "input")
# With NAT, as most routers have it: the server sees their address.
sh(
    """nft 'table inet nat {
        chain post {
            type nat hook postrouting priority 100
            oifname server masquerade
        }
    }'""",
    "router",
)
phase("on a router", "gateway", "router", "forward")
phase("on a router with services of its own", "both", "router", "prerouting")
