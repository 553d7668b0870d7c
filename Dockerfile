# The server's image. scripts/container_check.sh runs these steps where no container engine is.
FROM python:3.11-slim AS build

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    NUMBA_CPU_NAME=x86-64-v3 \
    NUMBA_CPU_FEATURES="" \
    NUMBA_CACHE_DIR=/app/.cache/kernels \
    PATH=/venv/bin:/usr/local/bin:/usr/bin:/bin

WORKDIR /app
RUN python -m venv /venv
COPY requirements.lock ./
RUN pip install --requirement requirements.lock
COPY client ./client
RUN pip install --no-deps ./client && rm -rf client
COPY kernels ./kernels
COPY service ./service
# Every kernel of every rule, for any x86 processor since 2015, so that no first push waits for a
# compiler. With the name alone Numba would still add the features of the machine that builds.
RUN python -m compileall -q kernels service && python -m service warm

FROM python:3.11-slim

# No useradd: a number is enough, and orchestrators can check that it is not root.
COPY --from=build /venv /venv
COPY --from=build /app /app

ENV NUMBA_CPU_NAME=x86-64-v3 \
    NUMBA_CPU_FEATURES="" \
    NUMBA_CACHE_DIR=/app/.cache/kernels \
    PYTHONUNBUFFERED=1 \
    PATH=/venv/bin:/usr/local/bin:/usr/bin:/bin \
    GRADPOST_HOST=0.0.0.0

WORKDIR /app
# For a volume, which takes the owner of the folder it covers: GRADPOST_DATA_DIR=/app/data/store.
RUN install -d -o 10001 -g 10001 /app/data
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-m", "service", "health"]
# Without GRADPOST_API_KEY callers get 403 key-required, which says what to set.
CMD ["python", "-m", "service", "serve"]
