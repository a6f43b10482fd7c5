# Build: docker build --tag firezone-relay .
#
# Run in the host's network:
#
#   docker run --detach --name firezone-relay --restart unless-stopped \
#       --network host --read-only --cap-drop ALL --security-opt no-new-privileges \
#       --ulimit nofile=65536:65536 --pids-limit 20000 --stop-timeout 15 \
#       --volume /etc/firezone-relay/token:/run/secrets/firezone-token:ro \
#       --env FIREZONE_TOKEN=/run/secrets/firezone-token --env FIREZONE_API_URL=wss://api.example.com \
#       --env PUBLIC_IP4_ADDR=203.0.113.7 \
#       --volume firezone-relay:/run/firezone-relay \
#       --env HANDOVER_SOCKET=/run/firezone-relay/handover.sock --env TAKE_OVER=true \
#       firezone-relay
#
# - Without `--network host`, 16,384 ports must be published to the same port numbers, and every packet passes Docker's NAT
#   or proxy. The proxy hides the addresses of clients and peers, which the relay needs. The NAT drops a mapping after two
#   minutes without packets, but an allocation lasts ten minutes.
# - Set `net.core.rmem_max` on the host, for all containers. deploy/firezone-relay.sysctl.conf has the value and the reason.
# - `nofile`: 2 descriptors per allocation (16,384), and 128 others. `--pids-limit`: 1 thread per allocation, and about 20
#   others. Docker sets no limit by default; other engines do.
# - `--stop-timeout`: seconds between SIGTERM and SIGKILL. Use DRAIN_TIMEOUT plus 15; the default is 10.
# - The token is a file that user 65532 can read. `docker inspect` would show the token in a variable.
# - With the volume, a second container takes over the relay (docs/upgrades.md).
#
# More in docs/deployment.md.

# The Python version of the tests.
FROM python:3.11-slim AS builder
WORKDIR /source
# clang compiles the XDP program. The final image has no compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends clang && rm -rf /var/lib/apt/lists/*
# The build needs only these files.
COPY pyproject.toml hatch_build.py *.md LICENSE ./
COPY requirements requirements
# otlp: with support for OpenTelemetry (OTLP_GRPC_ENDPOINT). relay: without (docker build --build-arg REQUIREMENTS=relay).
ARG REQUIREMENTS=otlp
COPY relay relay
COPY docs docs
COPY deploy deploy
# The virtual environment is created at its final path, because its programs contain the path. It has no pip, because nothing
# is installed later. Every package is pinned by its hash.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN pip install --require-hashes --requirement requirements/build.txt \
    && pip wheel --no-deps --no-index --no-build-isolation --wheel-dir dist . \
    && python -m venv --without-pip /opt/firezone-relay \
    && pip --python /opt/firezone-relay/bin/python install --require-hashes --requirement requirements/$REQUIREMENTS.txt \
    && pip --python /opt/firezone-relay/bin/python install --no-deps --no-index dist/*.whl

FROM python:3.11-slim
# For commands and health checks written for the image of Firezone's Rust relay: curl, ip and ethtool. The base image has sh.
RUN apt-get update && apt-get install --yes --no-install-recommends curl ethtool iproute2 && rm -rf /var/lib/apt/lists/*
COPY --from=builder /opt/firezone-relay /opt/firezone-relay
ENV PATH=/opt/firezone-relay/bin:$PATH

# For the socket of takeovers: a new volume here gets this owner and mode.
RUN install --directory --owner=65532 --group=65532 --mode=0700 /run/firezone-relay

# A numeric user, so that orchestrators can verify that the user isn't root. The relay writes no files but the socket of
# takeovers: pip has compiled the bytecode. All ports are above 1023, so the relay needs no capability.
USER 65532:65532
WORKDIR /

# Ports for clients and health checks. Without the ports of allocations (49152-65535/udp), which `docker run --publish-all`
# would publish to other port numbers.
EXPOSE 3478/udp 8080/tcp

# Checks that the relay is alive, also while it waits for its portal (`healthcheck --ready` checks that clients get responses).
# Like the relay, the check reads HEALTH_CHECK_ADDR. It costs a fifth of a second of CPU.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s CMD ["firezone-relay", "healthcheck"]

# No entry point, so that the command of a container can be a shell or another command of the program.
# Exec form without a shell, so that the relay is process 1 and receives the signal. By default, process 1 ignores SIGTERM; the
# relay handles it from the start, and exits with code 0.
STOPSIGNAL SIGTERM
CMD ["firezone-relay"]
