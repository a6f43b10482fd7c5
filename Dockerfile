# The relay as an image: docker build --tag firezone-relay .
#
# It is meant for the host's network:
#
#   docker run --detach --name firezone-relay --restart on-failure \
#       --network host --read-only --cap-drop ALL --security-opt no-new-privileges \
#       --ulimit nofile=65536:65536 --pids-limit 20000 --stop-timeout 15 \
#       --volume /etc/firezone-relay/token:/run/secrets/firezone-token:ro \
#       --env FIREZONE_TOKEN=/run/secrets/firezone-token --env PUBLIC_IP4_ADDR=203.0.113.7 \
#       firezone-relay
#
# - Without `--network host`, 16,384 ports have to be published, each to the same number, and every packet goes through
#   Docker's NAT or its proxy. The proxy hides the addresses of clients and peers, which are what a relay answers, checks and
#   tells; and a NAT forgets who has been silent for two minutes, an allocation doesn't for ten.
# - `net.core.rmem_max` is the host's to set, for all containers: deploy/firezone-relay.sysctl.conf has the value and why.
# - `nofile`: 2 descriptors for each of 16,384 allocations, and 128 others. `--pids-limit`: a thread for each, and some 20.
#   Docker has no limit on them unless told, other engines do.
# - `--stop-timeout`: seconds until Docker kills a relay that was asked to end. DRAIN_TIMEOUT and 15 more; unset, it is 10.
# - The token is a file that user 65532 can read, so that `docker inspect` doesn't show it: a variable would be shown.
#
# docs/deployment.md has the rest.

# The version that the tests run on.
FROM python:3.11-slim AS builder
WORKDIR /source
# Compiles the program that relays inside the kernel; the image itself needs no compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends clang && rm -rf /var/lib/apt/lists/*
# The build asks for these, and for nothing else.
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY requirements requirements
# otlp: with what it takes to push metrics to a collector (docker build --build-arg REQUIREMENTS=otlp).
ARG REQUIREMENTS=relay
COPY relay relay
# At its final place: the programs of a virtual environment have its path in them. Without a pip of its own: nothing is ever
# installed there again. Of all that is installed, here and there, the hash is known before.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN pip install --require-hashes --requirement requirements/build.txt \
    && pip wheel --no-deps --no-index --no-build-isolation --wheel-dir dist . \
    && python -m venv --without-pip /opt/firezone-relay \
    && pip --python /opt/firezone-relay/bin/python install --require-hashes --requirement requirements/$REQUIREMENTS.txt \
    && pip --python /opt/firezone-relay/bin/python install --no-deps --no-index dist/*.whl

FROM python:3.11-slim
COPY --from=builder /opt/firezone-relay /opt/firezone-relay

# A number, so that an orchestrator can see that it isn't root; no name is needed. It owns nothing and writes nothing: the
# bytecode has been made by pip. Ports are above 1023, so no capability is needed either.
USER 65532:65532
WORKDIR /

# Clients, health. The ports of allocations (49152-65535/udp) are left out: `docker run --publish-all` would publish each of
# them, and to another number.
EXPOSE 3478/udp 8080/tcp

# Whether the relay lives and does not hang, not whether it answers clients: one that waits for its portal is well (`healthcheck
# --ready` asks that). It looks where HEALTH_CHECK_ADDR says, as the relay does, and costs a fifth of a second of CPU.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s CMD ["/opt/firezone-relay/bin/firezone-relay", "healthcheck"]

# As a list, without a shell in between: the relay is process 1 itself, and gets the signal. By default process 1 gets none;
# the relay waits for this one from its first moment, and ends with exit code 0.
STOPSIGNAL SIGTERM
ENTRYPOINT ["/opt/firezone-relay/bin/firezone-relay"]
