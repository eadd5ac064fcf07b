#!/bin/sh
# What `make demo` shows, run inside a mesh: text in several domains, then the mesh itself.
set -eu

title() {
    printf '\n--- %s\n' "$1"
}

ask() {
    title "$1"
    printf '%s' "$2"
    expertmesh generate "$2" --max-tokens 40 --temperature 0.7 --seed 7
}

ask "stories" "Once there was a small turtle who wanted to see the mountain. Every morning"
ask "novels" "Captain Harlow lit his pipe, looked out at the grey harbour, and"
ask "german" "Am nächsten Morgen stand der alte Müller vor der Tür und"
ask "french" "Le lendemain, la vieille servante ouvrit les volets et"
ask "code" "def moving_average(values, window):"
ask "dict" "teapot (noun):"

title "expertmesh balancer status"
expertmesh balancer status
title "expertmesh balancer placement"
expertmesh balancer placement
