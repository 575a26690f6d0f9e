"""Runs a fail2ban with the action cwkill in a lab: an attacker and a bystander are connected to a server through a router.

A line in a log bans the attacker. Its connections must end at both ends, and those of the bystander must live. It runs in its own mount
and network namespaces, which scripts/test-fail2ban makes.
"""

import concurrent.futures
import ctypes
import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time

CWKILL, WORK = os.path.abspath(sys.argv[1]), sys.argv[2]
HERE = os.path.dirname(os.path.abspath(__file__))
PORT = 22
# For what comes at once unless the machine is very busy.
PATIENCE = 300
# For a connection that must not come.
REFUSED_WITHIN = 10
# Each connection has a source port of its own in the whole run. No NAT has a reason to change it, so it names the connection on every
# host. They are below those that the kernel chooses.
SOURCE_PORTS = itertools.count(20001)
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


def fail(what):
    sys.exit(f"FAILED: {what}\n{fail2ban_log()}")


def ensure(what, holds):
    if not holds:
        fail(what)


def wait(what, holds):
    until = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > until:
            fail(what)
        time.sleep(0.05)


def fail2ban_log():
    try:
        with open(f"{WORK}/fail2ban.log") as file:
            return file.read()
    except FileNotFoundError:
        return "(no log of fail2ban)"


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


def connect(netns, to, timeout=PATIENCE):
    source = ("", next(SOURCE_PORTS))
    connection = inside(netns, lambda: socket.create_connection((to, PORT), timeout=timeout, source_address=source))
    connection.settimeout(PATIENCE)
    return connection


def works(connection):
    try:
        connection.sendall(b"ping")
        return connection.recv(4096) == b"ping"
    except OSError as error:
        print(f"{connection}: {error}", file=sys.stderr)
        return False


def seen(netns, ports):
    """Those of the source ports whose connections ss shows there."""
    rows = sh("ss -Htn state connected exclude time-wait", netns).splitlines()
    # The last two columns are the ends.
    return ports & {int(end.rpartition(":")[2]) for row in rows for end in row.split()[-2:]}


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


def stop_fail2ban(server):
    server.terminate()
    try:
        server.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
        fail("fail2ban does not end")


def failed_actions(log):
    """Lines about actions that have failed. Status 4 of cwkill says that it could not see an end go: on a busy machine an answer may be
    late. Whether the connections are gone is looked at on their hosts."""
    lines = [line for line in log.splitlines() if "ERROR" in line or "Failed to" in line]
    statuses = re.findall(r"-- returned (\d+)", "\n".join(lines))
    if statuses and set(statuses) == {"4"}:
        print("an answer came late: cwkill ended with status 4", file=sys.stderr)
        return []
    return lines


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
            ensure("a connection does not work before the ban", works(connection))
        attacker = address(family, NETWORKS["attacker"], 2)
        ports = {connection.getsockname()[1] for connection in attacks}
        at_server = {connection.getsockname()[1] for connection in attacks[:2]}
        ensure("a connection is not seen at the attacker", seen("attacker", ports) == ports)
        ensure("a connection is not seen at the server", seen("server", ports) == at_server)
        # An address without connections first. It must be no failure.
        failed_login(address(family, NETWORKS["attacker"], 77))
        failed_login(attacker)
        wait("a connection is left at the attacker", lambda: not seen("attacker", ports))
        wait("a connection is left at the server", lambda: not seen("server", ports))
        if where == "both":
            wait("a connection is left at the router", lambda: not seen("router", ports))
        for connection in attacks:
            try:
                connection.sendall(b"x")
                ensure("the attacker still gets bytes", connection.recv(1) == b"")
            except OSError:
                pass
        for connection in others:
            ensure("the connection of the bystander is lost", works(connection))
        try:
            connect("attacker", to, REFUSED_WITHIN)
            fail("the attacker can connect again")
        except OSError:
            pass
        wait("no ban in the log", lambda: f"Ban {attacker}" in fail2ban_log())
    stop_fail2ban(server)
    lines = failed_actions(fail2ban_log())
    ensure("an action has failed: " + "; ".join(lines), not lines)
    print(f"{name}: the connections of a banned address end at both ends, those of a bystander live, of both families")


def main():
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


try:
    main()
except Exception as error:
    fail(repr(error))
