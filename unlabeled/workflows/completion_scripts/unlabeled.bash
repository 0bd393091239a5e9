# Completion for unlabeled, written by `unlabeled completion`. A TAB starts no Python: every name is in this file.
# @tables@

# The value that was given to $1 on the command line, else $2.
_unlabeled_given() {
    local pattern="(^|[[:space:]])$1=([A-Za-z0-9_]+)"
    if [[ $COMP_LINE =~ $pattern ]]; then REPLY=${BASH_REMATCH[2]:-${match[2]}}; else REPLY=$2; fi
}

# Settings that begin with $2, up to the next dot: `optim.` before `optim.lr=`.
_unlabeled_complete_key() {
    local command=$1 word=$2 key rest found=" " keys
    _unlabeled_keys "$command"; keys=$REPLY
    _unlabeled_given task mae; _unlabeled_task_keys "$command" "$REPLY"; keys+=" $REPLY"
    _unlabeled_given data folder; _unlabeled_source_keys "$command" "$REPLY"; keys+=" $REPLY"
    for key in $(echo $keys); do
        case $key in "$word"*) ;; *) continue ;; esac
        rest=${key#"$word"}
        case $rest in *.*) key="$word${rest%%.*}." ;; *) key="$key=" ;; esac
        case $found in *" $key "*) ;; *) found+="$key "; COMPREPLY+=("$key") ;; esac
    done
}

# Values of the setting $1 that begin with $2; within a list, values of its last entry.
_unlabeled_complete_value() {
    local key=$1 word=$2 before="" value
    case $word in "["*) before=${word%"${word##*[\[,]}"}; word=${word##*[\[,]} ;; esac
    # bash replaces what follows the equals sign only, unless that is no word break
    case ${COMP_WORDBREAKS-} in *=*) ;; *) before="$key=$before" ;; esac
    _unlabeled_values "$key"
    for value in $(echo $REPLY); do
        case $value in "$word"*) ;; *) continue ;; esac
        case $before in *"["*) COMPREPLY+=("$before$value") ;; *) COMPREPLY+=("$before$value ") ;; esac
    done
}

_unlabeled_complete_word() {
    local word=$1 choices=$2 choice
    for choice in $(echo $choices); do
        # a choice such as task=mae is completed behind its equals sign, where bash breaks words
        case $choice in "$word"*) ;; *) continue ;; esac
        case "${COMP_WORDBREAKS-} $word" in *=*" "*=*) choice=${choice#*=} ;; esac
        COMPREPLY+=("$choice ")
    done
}

_unlabeled() {
    local line=${COMP_LINE:0:$COMP_POINT} word before command REPLY
    word=${line##*[[:space:]]}
    word=${word#[\'\"]}
    before=${line%"${line##*[[:space:]]}"}
    set -- $(echo ${before//[^[:alnum:][:space:]_=.\/-]/ })
    command=${2-}
    COMPREPLY=()
    if [ $# -le 1 ]; then
        _unlabeled_complete_word "$word" "$_unlabeled_commands --help --version"
        return
    fi
    case $word in
        -*) _unlabeled_options "$command"; _unlabeled_complete_word "$word" "$REPLY --help"; return ;;
    esac
    case $command in
        settings) _unlabeled_complete_word "$word" "$_unlabeled_topics"; return ;;
        completion) _unlabeled_complete_word "$word" "bash zsh fish"; return ;;
    esac
    case $word in
        *=*) _unlabeled_complete_value "${word%%=*}" "${word#*=}"; return ;;
    esac
    if [ $# -eq 2 ]; then
        case $command in evaluate | finetune | export | sizes | report) return ;; esac  # a path, by the shell itself
    fi
    _unlabeled_complete_key "$command" "$word"
}

complete -o nospace -o default -F _unlabeled unlabeled
