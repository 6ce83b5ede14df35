# entropy-monitor: the command line, the watcher, the dashboard and the demo trainer in one image.
#
#   docker build -t entropy-monitor .
#   docker run --rm -v runs:/runs entropy-monitor status /runs/demo
#
# TORCH_INDEX_URL chooses the build of torch: by default PyTorch's CPU build; empty for pip's own default (on x86 Linux
# the CUDA build). Behind a mirror, hand in your pip configuration: --secret id=pip.conf,src=$HOME/.config/pip/pip.conf
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH}
# The large layers come before the sources, so that an edit does not download torch again.
COPY constraints.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install -c constraints.txt pip hatchling
# No dependencies from that index: it does not have them all in the pinned versions; the last step brings them.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install -c constraints.txt --no-deps ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} torch
COPY . .
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install -c constraints.txt --no-build-isolation ".[all]"

FROM ${BASE}
# A fixed number, so that files in a mounted /runs have an owner that the host can name.
RUN useradd --create-home --uid 10001 monitor && install -d -o monitor -g monitor /runs
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH} PYTHONUNBUFFERED=1
USER monitor
# Relative run directories (runs, ./demo) land on the volume.
WORKDIR /runs
VOLUME /runs
EXPOSE 8501
HEALTHCHECK --interval=60s --timeout=30s --start-period=20s CMD ["entropy-monitor", "doctor"]
ENTRYPOINT ["entropy-monitor"]
CMD ["--help"]
